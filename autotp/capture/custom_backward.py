"""custom_backward: what a model's own code says about its backward, which a captured graph would lose without a word.

torch.export records what runs forward; gradients are then those of the recorded ops. An ``autograd.Function`` whose
backward is another, a hook on a hidden tensor, or gradients taken inside forward would be gone. Each is refused by name
here, so that what holds it stays the Python that it is (see :mod:`autotp.partition.partition`); so are the hooks of
submodules (see :mod:`autotp.modules.hooks`).

Functions whose backward is the derivative of their forward are captured as the ops they run. Many are written for speed
or memory and compute what autograd would (BLOOM's GELU in training); others mean something else (gradients scaled,
reversed, or straight through a rounding). Numbers tell them apart: both derivatives are taken at random inputs of
several magnitudes, in float64.
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

__all__ = ["OwnBackward", "checked_functions", "refuse_function", "refuse_own_backward"]

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


_SCALES = (1.0, 0.05, 20.0)
_TOLERANCE = 1e-6
"""Relative; constants such as sqrt(2 / pi) are often written with eight digits."""


class _Context:
    """Stands for the context of a Function whose forward is run as ordinary code."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (True,) * count

    def _nothing(self, *_: Any) -> None:
        """Accept what a forward notes for its backward."""

    save_for_backward = save_for_forward = mark_non_differentiable = set_materialize_grads = _nothing


def _subclasses(cls: Any) -> Iterator[Any]:
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def _derivatives(run: Callable[..., Any], args: list[Any]) -> list[torch.Tensor]:
    """The gradients of a run's outputs, weighted at random, by its tensor arguments; zeros where there is none."""
    torch.manual_seed(0)
    found = run(*args)
    outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, torch.Tensor)]
    weights = [torch.randn(x.shape, dtype=x.dtype) for x in outputs]
    pairs = [(x, w) for x, w in zip(outputs, weights, strict=True) if x.requires_grad]
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if not pairs:
        return [torch.zeros_like(x) for x in tensors]
    grads = torch.autograd.grad([x for x, _ in pairs], tensors, [w for _, w in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=True)]


def _agrees(cls: Any, forward: Callable[..., Any], shapes: list[Any]) -> bool:
    """Whether a Function's backward gives the derivative of its forward, at random inputs.

    Args:
        cls: the Function.
        forward: its own forward.
        shapes: its arguments; for a tensor its shape.
    """
    alone = cls.setup_context is not torch.autograd.Function.setup_context
    with torch.random.fork_rng([]):
        for seed, scale in enumerate(_SCALES):
            torch.manual_seed(seed)
            drawn = [scale * torch.randn(x, dtype=torch.float64) if isinstance(x, torch.Size) else x for x in shapes]
            args = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in drawn]
            own = _derivatives(cls.apply, args)
            traced = _derivatives(forward if alone else lambda *a: forward(_Context(len(a)), *a), args)
            for a, b in zip(own, traced, strict=True):
                if not torch.isfinite(a).all() or float((a - b).abs().max()) > _TOLERANCE * float(a.abs().max()):
                    return False
    return True


def _agrees_apart(cls: Any, forward: Callable[..., Any], shapes: list[Any]) -> bool:
    """:func:`_agrees` in a thread of its own, where no tracing and no mode of the caller's is on."""
    found: list[bool] = []

    def check() -> None:
        with contextlib.suppress(Exception):  # a kernel that takes no float64, say
            found.append(_agrees(cls, forward, shapes))

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    return found == [True]


def _shapes(args: tuple[Any, ...]) -> list[Any] | None:
    """A Function's arguments with shapes for tensors; None where there are others than floats and constants."""
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
    """Look at every Function of the user's that is applied while this context is open.

    Args:
        active: whether the calling thread's are to be looked at.
        refuse: called with a Function whose backward is not the derivative of its forward.

    Yields:
        The Functions that were applied and whose backward is that derivative.
    """
    agreeing: set[type] = set()
    known: dict[Any, bool] = {}
    own = [c for c in _subclasses(torch.autograd.Function) if not f"{c.__module__}.".startswith(("torch.", "autotp."))]
    replaced = [(cls, cls.__dict__["forward"]) for cls in own if "forward" in cls.__dict__]

    def watched(cls: Any, forward: Callable[..., Any]) -> Any:
        alone = cls.setup_context is not torch.autograd.Function.setup_context

        def checked(*args: Any, **kwargs: Any) -> Any:
            if active():
                shapes = None if kwargs else _shapes(args if alone else args[1:])
                key = (cls, *(shapes or ()))
                if shapes is not None and key not in known:
                    known[key] = _agrees_apart(cls, forward, shapes)
                if shapes is None or not known[key]:
                    refuse(cls)
                agreeing.add(cls)
            return forward(*args, **kwargs)

        return staticmethod(checked)

    for cls, _ in replaced:
        cls.forward = watched(cls, cls.forward)
    try:
        yield agreeing
    finally:
        for cls, forward in replaced:
            cls.forward = forward
