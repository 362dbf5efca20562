"""Checks and changes of an ``nn.Module``.

Change here which kinds of models are refused, and how a forward is replaced. The package knows nothing of graphs or
ranks.
"""

from autotp.modules.device import device_of
from autotp.modules.forward_patching import capturing, own_forward, patch_forward, restore_forward
from autotp.modules.model_checks import check_model
from autotp.modules.names import tied_names

__all__ = ["capturing", "check_model", "device_of", "own_forward", "patch_forward", "restore_forward", "tied_names"]
