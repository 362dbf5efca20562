"""forward_patching: replace modules' forwards, and put their own back while they are captured."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from autotp.errors import AutoTPError
from autotp.modules.tracers import refuse_export, refuse_source, refuse_tracers

__all__ = [
    "Carried",
    "DeferredError",
    "Guard",
    "as_dense",
    "asked",
    "capturing",
    "in_call",
    "own_forward",
    "patch_forward",
    "repatch_forward",
    "restore_forward",
]


class Carried(Protocol):
    """The object that a module with a replaced forward carries."""

    own_forward: Any
    """The forward that was set on the module itself, if there was one."""


class _Asked(threading.local):
    options: Mapping[str, Any] | None = None


asked = _Asked()
"""Options for ``torch.compile`` if this thread's call comes from compiled code, so that graphs are compiled, too."""


def _run_compiled(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a replaced forward from compiled code, which does not trace into it.

    Guards and the ranks' agreement are not tensor code, and the graph is compiled by itself.
    """
    outer, asked.options = asked.options, {}
    try:
        return run(args, kwargs)
    finally:
        asked.options = outer


class _Forward:
    """A module's replaced ``forward``; its signature is the module's own."""

    def __init__(self, module: nn.Module, run: Callable[[tuple[Any, ...], Mapping[str, Any]], Any]) -> None:
        self.run = run
        self._compiled = torch.compiler.disable(_run_compiled)  # capture has imported the same before
        functools.update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            refuse_export()
            return self._compiled(self.run, args, kwargs)
        refuse_tracers()
        return self.run(args, kwargs)

    @property
    def __code__(self) -> Any:
        """The code of the module's own forward; torch.export reads it before it calls."""
        return inspect.unwrap(self).__code__

    @property
    def __globals__(self) -> Any:
        """Those who read them compile the module's own forward: torch.jit.script, torch.export, make_fx."""
        return refuse_source()


def patch_forward(
    module: nn.Module, run: Callable[[tuple[Any, ...], Mapping[str, Any]], Any], carried: Carried
) -> None:
    """Make ``run(args, kwargs)`` a module's forward, and let the module carry an object that has its own forward."""
    module.__dict__["_autotp"], module.__dict__["forward"] = carried, _Forward(module, run)


def restore_forward(module: nn.Module) -> None:
    """Give a module its own forward back."""
    module.__dict__.pop("forward", None)
    if (own := module.__dict__.pop("_autotp").own_forward) is not None:
        module.__dict__["forward"] = own


def own_forward(module: nn.Module) -> Any:
    """The forward that others than autotp have set on the module itself; None if it has its class's."""
    forward = module.__dict__.get("forward")
    return module.__dict__["_autotp"].own_forward if isinstance(forward, _Forward) else forward


def repatch_forward(model: nn.Module) -> None:
    """Replace forwards again that were replaced, and whose replacements others have deleted."""
    for module in model.modules():
        if (carried := module.__dict__.get("_autotp")) is not None and "forward" not in module.__dict__:
            patch_forward(module, carried, carried)


def in_call(error: BaseException | None, handled: BaseException | None = None) -> bool:
    """Whether an error, or one of its causes, was raised inside a replaced forward.

    Args:
        error: the error.
        handled: an earlier error, which was being handled when the code that raised this one began; it is no cause.
    """
    while error is not None and error is not handled:
        if any(frame.f_code is _Forward.__call__.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            return True
        error = error.__cause__ or error.__context__
    return False


class DeferredError:
    """Catches an error until the ranks have compared it, unless they know of it already.

    Args:
        known: returns whether the other ranks know of an error.

    Attributes:
        error: the error, if there was one.

    Example:
        >>> with DeferredError() as deferred:
        ...     result = forward(*args)
        >>> agreement.check("end of the call", 0, dict, deferred.error)
    """

    def __init__(self, known: Callable[[BaseException], bool] = in_call) -> None:
        self._known = known
        self.error: Exception | None = None

    def __enter__(self) -> DeferredError:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception) or self._known(error):
            return False
        self.error = error
        return True


class _Capturing(threading.local):
    now: bool = False


_capturing = _Capturing()


def capturing() -> bool:
    """Whether this thread captures a model; its submodules then run their own code, on fake tensors."""
    return _capturing.now


@contextlib.contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """Give the model and its submodules the forwards back that they had before autotp, for a time."""
    patched = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), _Forward)]
    replacements = [m.__dict__.pop("forward") for m in patched]
    for module in patched:
        if (own := module.__dict__["_autotp"].own_forward) is not None:
            module.__dict__["forward"] = own
    outer, _capturing.now = _capturing.now, True
    try:
        yield
    finally:
        _capturing.now = outer
        for module, forward in zip(patched, replacements, strict=True):
            module.__dict__["forward"] = forward


class Guard:
    """The pre-hook of a submodule that holds shards: it refuses to run the submodule's own forward.

    The submodule's own code would take its shards for dense weights. It would run if others have set the submodule's
    forward, or if the submodule is in an eager region.

    Args:
        name: the submodule's name.
        excused: returns whether the submodule may be called all the same.
    """

    def __init__(self, name: str, excused: Callable[[], bool]) -> None:
        self.name, self.excused = name, excused

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Raise if the submodule's own forward would run."""
        if not capturing() and not isinstance(module.__dict__.get("forward"), _Forward) and not self.excused():
            raise AutoTPError(
                f"{self.name} holds only this rank's shards of its weights, and its own forward cannot run: call the "
                "model that was parallelized, or parallelize this module instead of the model"
            )
