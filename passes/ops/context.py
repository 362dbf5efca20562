"""context: the groups of ranks and the random streams that a rewritten graph finds by name while it runs.

The graph names a group (``"tp"``; ``"tp:0,1|2,3"`` for its division into replica groups). The op asks the current
:class:`ParallelContext` for this rank's :class:`Communicator` in it. Processes and the lockstep simulation are two such
contexts; nothing in ``passes`` needs either.
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
    """Whether the host takes part in a collective, so that no CUDA graph can contain it."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, all of one shape."""
        ...

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same sum, perhaps in the memory of ``tensor``."""
        ...

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin :meth:`all_reduce_`, and return a function that waits for the sum and returns it.

        Until that function was called, this rank begins no other collective of the group.
        """
        ...

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The ranks' tensors in rank order; ``shapes`` holds the shape of each."""
        ...


class ParallelContext(Protocol):
    """One rank's groups and random streams."""

    def group(self, name: str) -> Communicator:
        """The communicator of the named group; of a divided group, of this rank's part."""
        ...

    def random(self, same: bool, device: torch.device) -> AbstractContextManager[None]:
        """A context manager in which random numbers are the same on all ranks, or else this rank's own."""
        ...


class _Current(threading.local):
    context: ParallelContext | None = None


_current = _Current()


def current() -> ParallelContext:
    """The context that this thread runs in.

    Raises:
        RuntimeError: there is none, because the graph was called outside of its runtime.
    """
    if _current.context is None:
        raise RuntimeError(
            "a rewritten graph runs inside its model: call the model that autotp.parallelize or "
            "autotp.simulate returned, or wrap the call in passes.ops.context.use_context(context)"
        )
    return _current.context


class use_context:  # noqa: N801
    """Run with ``context`` as the current one (written as a class: a generator takes a microsecond of each call).

    Example:
        >>> with use_context(context):
        ...     results = graph(*inputs)
    """

    def __init__(self, context: ParallelContext) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._before, _current.context = _current.context, self._context

    def __exit__(self, *_: object) -> None:
        _current.context = self._before


def replica_group(name: str, parts: Sequence[Sequence[int]]) -> str:
    """The name of the group ``name`` divided into ``parts``.

    >>> replica_group("tp", [(0, 1), (2, 3)])
    'tp:0,1|2,3'
    """
    return f"{name}:" + "|".join(",".join(map(str, part)) for part in parts)


def parse_group(name: str) -> tuple[str, list[list[int]]]:
    """The parent group and the parts of a name that :func:`replica_group` made; no parts if it is not divided."""
    parent, _, parts = name.partition(":")
    return parent, [[int(r) for r in part.split(",")] for part in parts.split("|")] if parts else []


_contexts: weakref.WeakValueDictionary[int, ParallelContext] = weakref.WeakValueDictionary()


def register(context: ParallelContext, name: str) -> str:
    """A key by which any thread finds the named group of a context (:func:`registered`)."""
    number = next((n for n, c in _contexts.items() if c is context), len(_contexts))
    while _contexts.setdefault(number, context) is not context:
        number += 1
    return f"{number}/{name}"


def registered(key: str) -> Communicator:
    """The communicator of a group, by the key that :func:`register` gave it."""
    number, _, name = key.partition("/")
    return _contexts[int(number)].group(name)
