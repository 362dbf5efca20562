"""What a rewritten graph needs of the world it runs in: groups of ranks that communicate, by name.

The graph names a group (``"tp"``; ``"tp:0,1|2,3"`` for its division into replica groups) and the op
asks the current :class:`ParallelContext` for the rank's :class:`Communicator`. Processes and the lockstep
simulation are two fabrics; nothing in ``passes`` needs either.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

__all__ = [
    "Communicator",
    "ParallelContext",
    "current",
    "parse_group",
    "register",
    "registered",
    "replica_group",
    "use_context",
]


class Communicator(Protocol):
    """One rank's end of a group. All ranks get the same bits, and only ``all_reduce_`` may change its argument."""

    rank: int
    size: int
    by_host: bool
    """Whether the host takes part in an exchange, so that no CUDA graph can hold it."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, all of one shape."""
        ...

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same, perhaps in the memory of ``tensor``."""
        ...

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin :meth:`all_reduce_`. What it returns waits for the sum, and gives it; until then this rank begins no
        other collective of the group."""
        ...

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The ranks' tensors in rank order; ``shapes`` says what shape each has."""
        ...


class ParallelContext(Protocol):
    """One rank's view of its world."""

    def group(self, name: str) -> Communicator:
        """The communicator of the named group, or of this rank's part of a divided one."""
        ...

    def random(self, same: bool, device: torch.device) -> AbstractContextManager[None]:
        """A context whose random numbers are the same on all ranks, or this rank's own."""
        ...


class _Current(threading.local):
    fabric: ParallelContext | None = None


_current = _Current()


def current() -> ParallelContext:
    """The fabric that this thread runs in.

    Raises:
        RuntimeError: there is none; the graph was called outside of its runtime.
    """
    if _current.fabric is None:
        raise RuntimeError(
            "a rewritten graph runs inside its model: call the model that autotp.parallelize or "
            "autotp.simulate returned, or wrap the call in passes.ops.context.use_context(fabric)"
        )
    return _current.fabric


class use_context:  # noqa: N801
    """Run with ``fabric`` as the current one (written as a class: a generator takes a microsecond of each call).

    Example:
        >>> with use(fabric):
        ...     results = graph(*inputs)
    """

    def __init__(self, fabric: ParallelContext) -> None:
        self._fabric = fabric

    def __enter__(self) -> None:
        self._before, _current.fabric = _current.fabric, self._fabric

    def __exit__(self, *_: object) -> None:
        _current.fabric = self._before


def replica_group(name: str, parts: Sequence[Sequence[int]]) -> str:
    """The name of the group ``name`` divided into ``parts``.

    >>> replica_group("tp", [(0, 1), (2, 3)])
    'tp:0,1|2,3'
    """
    return f"{name}:" + "|".join(",".join(map(str, part)) for part in parts)


def parse_group(name: str) -> tuple[str, list[list[int]]]:
    """The parent group and the parts of a name that :func:`replica_group` made (no parts: undivided)."""
    parent, _, parts = name.partition(":")
    return parent, [[int(r) for r in part.split(",")] for part in parts.split("|")] if parts else []


_fabrics: weakref.WeakValueDictionary[int, ParallelContext] = weakref.WeakValueDictionary()


def register(fabric: ParallelContext, name: str) -> str:
    """A key for a group of a fabric that says in any thread which one is meant (:func:`registered`)."""
    number = next((n for n, f in _fabrics.items() if f is fabric), len(_fabrics))
    while _fabrics.setdefault(number, fabric) is not fabric:
        number += 1
    return f"{number}/{name}"


def registered(key: str) -> Communicator:
    """The communicator of a group by its key."""
    number, _, name = key.partition("/")
    return _fabrics[int(number)].group(name)
