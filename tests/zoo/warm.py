"""What all processes that measure need: imported, and enumerated, once in the process that they are forked from."""
# ruff: noqa: F401 - imported here so that they need not be there

import torch._dynamo
import torch.export
import transformers.conversion_mapping
import transformers.exporters
import transformers.loss.loss_utils
import transformers.masking_utils
import transformers.modeling_utils

import tests.zoo.measure
from tests.zoo.architectures import architectures

architectures()
