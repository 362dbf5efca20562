"""What autotp asks of, and does to, an ``nn.Module``.

Kinds of models that are refused, and the way a forward is replaced, are changed here. It must know nothing of graphs or
ranks.
"""

from autotp.modules.device import device_of
from autotp.modules.forward_patching import capturing, install, own_forward, uninstall
from autotp.modules.model_checks import admit
from autotp.modules.names import tied_names

__all__ = ["admit", "capturing", "device_of", "install", "own_forward", "tied_names", "uninstall"]
