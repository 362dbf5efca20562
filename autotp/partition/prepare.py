"""prepare: check a dense model and capture it; plans and simulations start so."""

from __future__ import annotations

from torch import nn

from autotp.capture.example_inputs import ExampleInputs, example_call
from autotp.errors import check_tp
from autotp.modules.model_checks import check_model
from autotp.partition.partition import Partition, partition_model

__all__ = ["prepare"]


def prepare(model: nn.Module, tp: int, example_inputs: ExampleInputs) -> Partition:
    """Check a model, find example inputs if none are given, and capture it, whole or as its largest capturable modules.

    Args:
        model: the dense model; it is left as it was.
        tp: the number of ranks.
        example_inputs: as for :func:`autotp.parallelize`.

    Raises:
        ValueError: ``tp`` is no number of ranks.
        AutoTPError: the model is compiled, wrapped or quantized.
        CaptureError: no inputs are found, or no part of the model can be captured.
    """
    check_tp(tp)
    check_model(model)
    args, kwargs = example_call(model, example_inputs)
    return partition_model(model, tp, args, kwargs)
