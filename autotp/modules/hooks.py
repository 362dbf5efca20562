"""hooks: refuse hooks on submodules, which a captured graph would not run."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from autotp.errors import AutoTPError, CaptureError

__all__ = ["HOOKS", "refuse_global_hooks", "refuse_hooks"]

HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}
"""The attributes in which a module keeps the hooks that run in its calls, and words for them."""

_HARMLESS = (
    "autotp.modules.forward_patching.Guard",
    "transformers.utils.output_capturing.",
    "transformers.modeling_utils.PreTrainedModel.enable_input_require_grads.",
)
"""Autotp's own hook, and those of transformers: recorders of hidden states, which also work in capture, and flags on
hidden values."""


def _name(hook: Any) -> str:
    """``module.Class.function`` of a hook, or of the class whose instance it is."""
    return f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"


def refuse_hooks(model: nn.Module) -> None:
    """Raise if a submodule has hooks; the model's own hooks are allowed, since they run around the graph.

    Raises:
        CaptureError: a submodule has a hook; the message names both.
    """
    for name, module in model.named_modules():
        for kind, what in HOOKS.items() if name else ():
            for hook in module.__dict__[kind].values():
                if not _name(hook).startswith(_HARMLESS):
                    reason = f"{name} ({type(module).__name__}) has {what}, {_name(hook)}"
                    raise CaptureError(f"{reason}, which a captured graph would lose", reason=reason)


def refuse_global_hooks() -> None:
    """Raise an AutoTPError if hooks are registered for all modules (``register_module_forward_hook``)."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    if any(getattr(torch_module, f"_global_{kind}_hooks", None) for kind in kinds):
        raise AutoTPError(
            "hooks are registered for all modules (torch.nn.modules.module.register_module_..._hook), but the "
            "submodules of a parallelized model are not called: remove them, or register them on the model itself"
        )
