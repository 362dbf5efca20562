"""custom_backward: refuse code that defines its own backward, which a captured graph would silently lose.

torch.export records the ops that forward runs, and gradients are then those of the recorded ops. Three things would be
lost: an ``autograd.Function`` whose backward is not the derivative of its forward, a hook on an intermediate tensor,
and gradients taken inside forward. Each is refused by name here, so that the module with it keeps running as its own
Python (see :mod:`autotp.partition.partition`). Hooks of submodules are refused, too (see :mod:`autotp.modules.hooks`).

A Function whose backward is the derivative of its forward is captured as the ops that it runs. Many Functions are
written for speed or memory only, and compute what autograd would (BLOOM's GELU in training); others compute something
else (gradients scaled, reversed, or straight through a rounding). Numbers tell them apart: both derivatives are
computed in float64, at random inputs of several magnitudes, and compared.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import traceback
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from autotp.errors import CaptureError
from autotp.utils.value_types import SCALARS

__all__ = ["RefuseOwnBackward", "checked_functions", "refuse_function", "refuse_own_backward"]

_REFUSED = {
    torch.Tensor.register_hook: "registers a hook on a tensor's gradient",
    torch.Tensor.register_post_accumulate_grad_hook: "registers a hook on a tensor's gradient",
    torch.Tensor.backward: "runs a backward of its own",
    torch.autograd.grad: "takes gradients of its own",
    torch.autograd.backward: "runs a backward of its own",
}

_ALLOWED = ("torch._library.", "torch._higher_order_ops.", "autotp.")
"""Modules whose Functions are allowed: those of ops that a graph keeps with their derivative, and of tracing itself."""


def _caller() -> str:
    """``path:line`` of the innermost frame outside torch and this file."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


class RefuseOwnBackward(TorchFunctionMode):
    """A mode that raises a CaptureError where code registers hooks on gradients or takes gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse hooks and gradients; run any other function."""
        if func in _REFUSED:
            raise CaptureError(
                f"the model's Python at {_caller()} {_REFUSED[func]}, which a captured graph would lose",
                place=_caller(),
                reason=_REFUSED[func],
            )
        return func(*args, **(kwargs or {}))


def refuse_function(function: type) -> None:
    """Refuse an ``autograd.Function`` whose backward a captured graph would lose.

    Raises:
        CaptureError: always; it names the Function and the line of its definition.
    """
    place = _definition(function)
    reason = f"autograd.Function {function.__name__} has a backward of its own"
    message = f"{reason}{f' ({place})' if place else ''}, which a captured graph would lose"
    raise CaptureError(message, place=place, reason=reason)


def refuse_own_backward(
    results: Iterable[torch.Tensor], leaves: Iterable[torch.Tensor], agreeing: Container[Any] = ()
) -> None:
    """Refuse results that depend on a derivative, or on a parameter, that a graph cannot hold.

    Args:
        results: the tensors that the model returned, traced with gradients enabled.
        leaves: the model's parameters and inputs.
        agreeing: the Functions whose backward is the derivative of their forward.

    Raises:
        CaptureError: there is one; it names the ``autograd.Function``, or the shape of the tensor.
    """
    known = {id(x) for x in leaves}
    pending: list[Any] = [r.grad_fn for r in results if r.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if isinstance(node, BackwardCFunction):
            function: Any = getattr(type(node), "_forward_cls", type(node))
            if function not in agreeing and not str(function.__module__).startswith(_ALLOWED):
                refuse_function(function)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            reason = f"uses a tensor {tuple(variable.shape)} that requires a gradient and is no parameter of it"
            raise CaptureError(f"the model {reason}: register it as one", reason=reason)
        for next_node, _ in node.next_functions:
            if next_node is not None and next_node not in seen:
                seen.add(next_node)
                pending.append(next_node)


def _definition(function: Any) -> str:
    """``path:line`` of a class's definition; ``""`` if it cannot be found or is in torch."""
    try:
        path = inspect.getsourcefile(function) or ""
        return f"{path}:{inspect.getsourcelines(function)[1]}" if "/torch/" not in path else ""
    except (OSError, TypeError):
        return ""


_SCALES = (1.0, 0.05, 20.0)
_TOLERANCE = 1e-6
"""Relative; constants such as sqrt(2 / pi) are often written with eight digits."""


class _Context:
    """The context of a Function whose forward runs as ordinary code."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (True,) * count

    def _ignore(self, *_: Any) -> None:
        """Accept the values that a forward saves for its backward, and drop them."""

    save_for_backward = save_for_forward = mark_non_differentiable = set_materialize_grads = _ignore


def _subclasses(cls: Any) -> Iterator[Any]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _derivatives(run: Callable[..., Any], args: list[Any]) -> list[torch.Tensor]:
    """The gradients of a function's tensor arguments, for randomly weighted outputs; zeros where there is none."""
    torch.manual_seed(0)
    result = run(*args)
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
    weights = [torch.randn(x.shape, dtype=x.dtype) for x in outputs]
    pairs = [(x, w) for x, w in zip(outputs, weights, strict=True) if x.requires_grad]
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if not pairs:
        return [torch.zeros_like(x) for x in tensors]
    grads = torch.autograd.grad([x for x, _ in pairs], tensors, [w for _, w in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=True)]


def _backward_matches(cls: Any, forward: Callable[..., Any], shapes: list[Any]) -> bool:
    """Whether a Function's backward computes the derivative of its forward, at random inputs.

    Args:
        cls: the Function.
        forward: its original forward.
        shapes: its arguments, with a shape for each tensor.
    """
    without_context = cls.setup_context is not torch.autograd.Function.setup_context
    with torch.random.fork_rng([]):
        for seed, scale in enumerate(_SCALES):
            torch.manual_seed(seed)
            values = [scale * torch.randn(x, dtype=torch.float64) if isinstance(x, torch.Size) else x for x in shapes]
            args = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in values]
            own = _derivatives(cls.apply, args)
            traced = _derivatives(forward if without_context else lambda *a: forward(_Context(len(a)), *a), args)
            for a, b in zip(own, traced, strict=True):
                if not torch.isfinite(a).all() or float((a - b).abs().max()) > _TOLERANCE * float(a.abs().max()):
                    return False
    return True


def _backward_matches_in_thread(cls: Any, forward: Callable[..., Any], shapes: list[Any]) -> bool:
    """:func:`_backward_matches` in a thread of its own, where neither tracing nor a mode of the caller is active."""
    results: list[bool] = []

    def check() -> None:
        with contextlib.suppress(Exception):  # for example, a kernel that does not support float64
            results.append(_backward_matches(cls, forward, shapes))

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    return results == [True]


def _argument_shapes(args: tuple[Any, ...]) -> list[Any] | None:
    """A Function's arguments with a shape for each tensor; None if any is neither a float tensor nor a constant."""
    shapes: list[Any] = []
    for x in args:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            shapes.append(torch.Size(n if isinstance(n, int) else int(n.node.hint or 2) for n in x.shape))
        elif isinstance(x, (*SCALARS, torch.dtype)):
            shapes.append(x)
        else:
            return None
    return shapes


@contextlib.contextmanager
def checked_functions(active: Callable[[], bool], refuse: Callable[[type], None]) -> Iterator[set[type]]:
    """Check the backward of every Function of the user's that is applied while this context is open.

    Args:
        active: whether Functions that the calling thread applies are to be checked.
        refuse: called with a Function whose backward is not the derivative of its forward.

    Yields:
        The Functions that were applied, and whose backward is the derivative of their forward.
    """
    agreeing: set[type] = set()
    verdicts: dict[Any, bool] = {}
    own = [c for c in _subclasses(torch.autograd.Function) if not f"{c.__module__}.".startswith(("torch.", "autotp."))]
    originals = [(cls, cls.__dict__["forward"]) for cls in own if "forward" in cls.__dict__]

    def checked_forward(cls: Any, forward: Callable[..., Any]) -> Any:
        without_context = cls.setup_context is not torch.autograd.Function.setup_context

        def checked(*args: Any, **kwargs: Any) -> Any:
            if active():
                shapes = None if kwargs else _argument_shapes(args if without_context else args[1:])
                key = (cls, *(shapes or ()))
                if shapes is not None and key not in verdicts:
                    verdicts[key] = _backward_matches_in_thread(cls, forward, shapes)
                if shapes is None or not verdicts[key]:
                    refuse(cls)
                agreeing.add(cls)
            return forward(*args, **kwargs)

        return staticmethod(checked)

    for cls, _ in originals:
        cls.forward = checked_forward(cls, cls.forward)
    try:
        yield agreeing
    finally:
        for cls, forward in originals:
            cls.forward = forward
