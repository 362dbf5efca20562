"""autograd Functions: those whose backward is the derivative of their forward can be captured as the ops they run.

Many are written for speed or memory and compute what autograd would (BLOOM's GELU in training); others
mean something else (gradients scaled, reversed, or straight through a rounding). Numbers tell them
apart: both derivatives are taken at random inputs of several magnitudes, in float64.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["checked_functions"]

_PLAIN = (type(None), bool, int, float, str, torch.dtype)
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
        elif isinstance(x, _PLAIN):
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
