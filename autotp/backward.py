"""What a model's own code says about its backward, which a captured graph would lose without a word.

torch.export records what runs forward; gradients are then those of the recorded ops. An
``autograd.Function`` whose backward is another (see :mod:`autotp.functions`), a hook on a hidden tensor,
or gradients taken inside forward would be gone. Each is refused by name here, so that what holds it stays
the Python that it is (see :mod:`autotp.parts`); so are the hooks of submodules (see :mod:`autotp.hooks`).
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from autotp.errors import CaptureError

__all__ = ["OwnBackward", "refuse_function", "refuse_own_backward"]

_REFUSED = {
    torch.Tensor.register_hook: "registers a hook on a tensor's gradient",
    torch.Tensor.register_post_accumulate_grad_hook: "registers a hook on a tensor's gradient",
    torch.Tensor.backward: "runs a backward of its own",
    torch.autograd.grad: "takes gradients of its own",
    torch.autograd.backward: "runs a backward of its own",
}

_KEPT = ("torch._library.", "torch._higher_order_ops.", "autotp.")
"""Where the Functions are defined of ops that a graph holds as they are, derivative and all, and of tracing itself."""


def _caller() -> str:
    """``path:line`` of the innermost frame outside torch and this file."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


class OwnBackward(TorchFunctionMode):
    """A mode in which code that reaches into its own backward raises a CaptureError."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse hooks and gradients; anything else as it is."""
        if func in _REFUSED:
            raise CaptureError(
                f"the model's Python at {_caller()} {_REFUSED[func]}, which a captured graph would lose",
                place=_caller(),
                reason=_REFUSED[func],
            )
        return func(*args, **(kwargs or {}))


def refuse_function(function: type) -> None:
    """Raise for an ``autograd.Function`` whose backward a captured graph would lose.

    Raises:
        CaptureError: it names the Function and where it is defined.
    """
    place = _defined(function)
    reason = f"autograd.Function {function.__name__} has a backward of its own"
    said = f"{reason}{f' ({place})' if place else ''}, which a captured graph would lose"
    raise CaptureError(said, place=place, reason=reason)


def refuse_own_backward(
    results: Iterable[torch.Tensor], leaves: Iterable[torch.Tensor], agreeing: Container[Any] = ()
) -> None:
    """Raise if results, traced with gradients on, depend on a derivative or a parameter that a graph cannot hold.

    Args:
        results: what the model returned.
        leaves: the model's parameters and inputs.
        agreeing: the Functions whose backward is the derivative of their forward.

    Raises:
        CaptureError: it names the ``autograd.Function``, or the shape of the tensor.
    """
    known = {id(x) for x in leaves}
    pending: list[Any] = [r.grad_fn for r in results if r.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if isinstance(node, BackwardCFunction):
            function: Any = getattr(type(node), "_forward_cls", type(node))
            if function not in agreeing and not str(function.__module__).startswith(_KEPT):
                refuse_function(function)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            reason = f"uses a tensor {tuple(variable.shape)} that requires a gradient and is no parameter of it"
            raise CaptureError(f"the model {reason}: register it as one", reason=reason)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


def _defined(function: Any) -> str:
    """``path:line`` where a class is defined, if that can be found and is not within torch."""
    try:
        path = inspect.getsourcefile(function) or ""
        return f"{path}:{inspect.getsourcelines(function)[1]}" if "/torch/" not in path else ""
    except (OSError, TypeError):
        return ""
