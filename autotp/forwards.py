"""forwards: modules run something else in place of their own forward, and their own again while they are captured."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from autotp.errors import AutoTPError

__all__ = ["Carried", "Guard", "as_dense", "capturing", "install", "own_forward", "uninstall"]


class Carried(Protocol):
    """What a module whose forward was replaced carries."""

    own_forward: Any
    """The forward that was set on the module itself, if there was one."""


class _Forward:
    """A module's replaced ``forward``; its signature is the module's own."""

    def __init__(self, module: nn.Module, run: Callable[[tuple[Any, ...], Mapping[str, Any]], Any]) -> None:
        self.run = run
        functools.update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)


def install(module: nn.Module, run: Callable[[tuple[Any, ...], Mapping[str, Any]], Any], carried: Carried) -> None:
    """Let ``run(args, kwargs)`` be a module's forward, and let it carry what knows its own forward."""
    module.__dict__["_autotp"], module.__dict__["forward"] = carried, _Forward(module, run)


def uninstall(module: nn.Module) -> None:
    """Give a module its own forward back."""
    del module.__dict__["forward"]
    if (own := module.__dict__.pop("_autotp").own_forward) is not None:
        module.__dict__["forward"] = own


def own_forward(module: nn.Module) -> Any:
    """The forward that was set on a module itself, by others than autotp; None for its class's."""
    carried = module.__dict__.get("_autotp")
    return module.__dict__.get("forward") if carried is None else carried.own_forward


class _Capturing(threading.local):
    now: bool = False


_capturing = _Capturing()


def capturing() -> bool:
    """Whether a model is being captured in this thread: then its submodules' own code runs, on stand-ins."""
    return _capturing.now


@contextlib.contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """The model and its submodules with the forwards that they had before autotp, and callable."""
    replaced = [m for m in model.modules() if "_autotp" in m.__dict__]
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

    Args:
        name: the submodule's.
        excused: whether it may be called now all the same.
    """

    def __init__(self, name: str, excused: Callable[[], bool]) -> None:
        self.name, self.excused = name, excused

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Refuse."""
        if not capturing() and not self.excused():
            raise AutoTPError(
                f"{self.name} holds only this rank's share of its weights and cannot be called by itself: call the "
                "model that was parallelized, or parallelize this module instead of the whole"
            )
