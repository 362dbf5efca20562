"""between: a call that cannot be captured runs the module's own Python, and its submodules as graphs of their own.

A model may be captured for the calls that it was seen with, and not for another, because its Python then depends on
the values in a tensor (how full a static cache is). What it computes there is whole, and the same on every rank; each
of its submodules that hold shards runs as it does when it is called by itself (:mod:`autotp.inside`), and goes the same
way where it cannot be captured either. Only without gradients: what recomputes a part of a forward in the backward
would find other random numbers.
"""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from autotp.errors import CaptureError, PartialCaptureWarning
from autotp.forwards import HeldBack
from autotp.inputs import device_of
from autotp.observe import Touches
from autotp.parts import outside_of_parts
from autotp.process import ProcessFabric

if TYPE_CHECKING:
    from autotp.runtime import Whole

__all__ = ["Between", "inside_of_python"]


class _Running(threading.local):
    touches: Touches | None = None


_running = _Running()


@contextlib.contextmanager
def inside_of_python() -> Iterator[None]:
    """What a submodule does, which may read its shards while the Python around it may not."""
    touches = _running.touches
    if touches is None:
        yield
        return
    suspended, touches.suspended = touches.suspended, True
    try:
        yield
    finally:
        touches.suspended = suspended


class Between:
    """A module's own Python between the graphs of its submodules.

    Args:
        whole: the module's runtime.
    """

    def __init__(self, whole: Whole) -> None:
        self.whole = whole
        mesh, fabric = whole.mesh, whole.fabric
        self.random = ProcessFabric(mesh, fabric.seed + 1 + mesh.tp, whole.agreement.missing, fabric.timeout, False)
        self._warned = False

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], why: CaptureError) -> Any:
        """A call of the module: its own forward.

        Args:
            args: the positional arguments, the same on all ranks.
            kwargs: those by keyword.
            why: why it cannot be captured.
        """
        model, whole = self.whole.model, self.whole
        if not self._warned:
            self._warned = True
            name = whole.programs.path or f"this {type(model).__name__}"
            warnings.warn(
                f"a call of {name} cannot be captured{f' ({why.place})' if why.place else ''}: {why.reason}. Its own "
                "Python runs, on whole values, and its submodules as graphs of their own",
                PartialCaptureWarning,
                stacklevel=2,
            )
        own = whole.own_forward or types.MethodType(type(model).forward, model)
        before, touches = _running.touches, outside_of_parts(model, whole.shards)
        result, held = None, HeldBack()
        try:
            with held, contextlib.ExitStack() as around:
                for device in {torch.device("cpu"), device_of(model)}:
                    around.enter_context(self.random.random(True, device))
                around.enter_context(touches)
                _running.touches = touches
                result = own(*args, **kwargs)
        finally:
            _running.touches = before
        assert whole.programs.comparison is not None
        whole.programs.comparison.end(result, held.error)
        whole.programs.watch.follow()
        return result
