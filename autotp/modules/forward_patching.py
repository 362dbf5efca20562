"""forwards: modules run something else in place of their own forward, and their own again while they are captured."""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from autotp.errors import AutoTPError

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
    """What a module whose forward was replaced carries."""

    own_forward: Any
    """The forward that was set on the module itself, if there was one."""


class _Asked(threading.local):
    options: Mapping[str, Any] | None = None


asked = _Asked()
"""Whether this thread's call comes out of ``torch.compile``'d code: then graphs are compiled, too."""


def _run_compiled(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What compiled code calls, and does not look into: recognition, comparison and exchange are no tensor code, and
    the graph is compiled by itself, whole."""
    before, asked.options = asked.options, {}
    try:
        return run(args, kwargs)
    finally:
        asked.options = before


class _Forward:
    """A module's replaced ``forward``; its signature is the module's own."""

    def __init__(self, module: nn.Module, run: Callable[[tuple[Any, ...], Mapping[str, Any]], Any]) -> None:
        self.run = run
        self._compiled = torch.compiler.disable(_run_compiled)  # imports what capture has imported before
        functools.update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(self.run, args, kwargs)
        return self.run(args, kwargs)


def patch_forward(
    module: nn.Module, run: Callable[[tuple[Any, ...], Mapping[str, Any]], Any], carried: Carried
) -> None:
    """Let ``run(args, kwargs)`` be a module's forward, and let it carry what knows its own forward."""
    module.__dict__["_autotp"], module.__dict__["forward"] = carried, _Forward(module, run)


def restore_forward(module: nn.Module) -> None:
    """Give a module its own forward back."""
    del module.__dict__["forward"]
    if (own := module.__dict__.pop("_autotp").own_forward) is not None:
        module.__dict__["forward"] = own


def own_forward(module: nn.Module) -> Any:
    """The forward that was set on a module itself, by others than autotp; None for its class's."""
    found = module.__dict__.get("forward")
    return module.__dict__["_autotp"].own_forward if isinstance(found, _Forward) else found


def repatch_forward(model: nn.Module) -> None:
    """Let modules whose forwards were replaced, and then deleted by others, run again what they ran."""
    for module in model.modules():
        if (carried := module.__dict__.get("_autotp")) is not None and "forward" not in module.__dict__:
            patch_forward(module, carried, carried)


def in_call(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised because of, was raised in what runs in place of a forward."""
    while error is not None:
        if any(frame.f_code is _Forward.__call__.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            return True
        error = error.__cause__ or error.__context__
    return False


class DeferredError:
    """Holds an error back until the ranks have compared it, unless they know of it already.

    Args:
        known: whether they know of an error.

    Attributes:
        error: the error, if there was one.

    Example:
        >>> with HeldBack() as held:
        ...     result = forward(*args)
        >>> agreement.check("end of the call", 0, dict, held.error)
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
    """Whether a model is being captured in this thread: then its submodules' own code runs, on stand-ins."""
    return _capturing.now


@contextlib.contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """The model and its submodules with the forwards that they had before autotp, and callable."""
    replaced = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), _Forward)]
    ours = [m.__dict__.pop("forward") for m in replaced]
    for module in replaced:
        if (own := module.__dict__["_autotp"].own_forward) is not None:
            module.__dict__["forward"] = own
    before, _capturing.now = _capturing.now, True
    try:
        yield
    finally:
        _capturing.now = before
        for module, forward in zip(replaced, ours, strict=True):
            module.__dict__["forward"] = forward


class Guard:
    """The pre-hook of a submodule that holds shards: its own code, which computes on whole weights, must not run.

    Something else runs in its place, unless it is between the parts of a model or someone has set its forward.

    Args:
        name: the submodule's.
        excused: whether it may be called now all the same.
    """

    def __init__(self, name: str, excused: Callable[[], bool]) -> None:
        self.name, self.excused = name, excused

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Refuse."""
        if not capturing() and not isinstance(module.__dict__.get("forward"), _Forward) and not self.excused():
            raise AutoTPError(
                f"{self.name} holds only this rank's share of its weights, and its own forward cannot run: call the "
                "model that was parallelized, or parallelize this module instead of the whole"
            )
