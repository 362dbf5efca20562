"""tally: count the collectives that really run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from autotp.distributed.communicators import ProcessCommunicator
from autotp.distributed.shared_memory import SharedMemory
from autotp.distributed.symmetric_memory import SymmetricMemory

__all__ = ["Tally"]

_ENDS = (SharedMemory, SymmetricMemory, ProcessCommunicator)
_REDUCE = "all_reduce"
_KINDS = {"all_reduce": _REDUCE, "all_reduce_": _REDUCE, "start_all_reduce": _REDUCE, "all_gather": "all_gather"}


class Tally:
    """Counts the collectives of parallelized models in this process, whichever communicator runs them.

    The comparisons of the ranks before each step are not counted. Only one tally may be open at a time.

    Attributes:
        calls: the number of collectives by kind: ``all_reduce``, ``all_gather``.
        elements: the number of elements of the reduced, or gathered, values by kind.
        bytes: the number of bytes of these values by kind.

    Example:
        >>> with autotp.Tally() as tally:
        ...     loss = model(**batch).loss
        >>> tally.calls["all_reduce"]
        17
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __enter__(self) -> Tally:
        self._inside = False
        self._originals = {(end, kind): getattr(end, kind) for end in _ENDS for kind in _KINDS}
        for (end, kind), call in self._originals.items():
            setattr(end, kind, self._counting(_KINDS[kind], call))
        return self

    def _counting(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(end: Any, tensor: torch.Tensor, *shapes: Any) -> Any:
            if self._inside:  # a communicator through memory has called its fallback
                return call(end, tensor, *shapes)
            self._inside = True
            try:
                result = call(end, tensor, *shapes)
            finally:
                self._inside = False
            elements = tensor.numel() if kind == _REDUCE else sum(t.numel() for t in result)
            self.calls[kind] += 1
            self.elements[kind] += elements
            self.bytes[kind] += elements * tensor.element_size()
            return result

        return count

    def __exit__(self, *_: Any) -> None:
        for (end, kind), call in self._originals.items():
            setattr(end, kind, call)
