"""tally: the collectives that really run, counted where a rank meets the others."""

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
    """Counts the collectives of parallelized models in this process, in whichever way they run.

    Those by which ranks compare what they do, before they do it, are not among them. One at a time.

    Attributes:
        calls: how many, by kind: ``all_reduce``, ``all_gather``.
        elements: of the reduced values, and of the gathered ones.
        bytes: of the same.

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
        self._own = {(end, kind): getattr(end, kind) for end in _ENDS for kind in _KINDS}
        for (end, kind), call in self._own.items():
            setattr(end, kind, self._counted(_KINDS[kind], call))
        return self

    def _counted(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(end: Any, tensor: torch.Tensor, *shapes: Any) -> Any:
            if self._inside:  # what memory leaves to the process group
                return call(end, tensor, *shapes)
            self._inside = True
            try:
                result = call(end, tensor, *shapes)
            finally:
                self._inside = False
            count = tensor.numel() if kind == _REDUCE else sum(t.numel() for t in result)
            self.calls[kind] += 1
            self.elements[kind] += count
            self.bytes[kind] += count * tensor.element_size()
            return result

        return counted

    def __exit__(self, *_: Any) -> None:
        for (end, kind), call in self._own.items():
            setattr(end, kind, call)
