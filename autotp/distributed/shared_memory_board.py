"""shared_memory_board: the mapped memory and the protocol by which CPU ranks of one host exchange values.

A reduction of a few KiB between two processes takes gloo half a millisecond, which is sockets and threads; the
data take a microsecond. Here each rank writes what it has to say into a slot of its own, says so in a
counter of its own, and reads the others' slots once their counters say that they have.

The protocol (:func:`exchange`) has no lock and nothing that two ranks write:

- exchange ``n`` uses slot ``n % 2`` of each rank. A rank fills its slot, then sets its counter to ``n``, waits until
  every counter is ``n`` or more, and reads all slots.
- Two slots are enough. A rank that fills its slot for ``n + 2`` has seen every counter reach ``n + 1``, and
  a rank sets ``n + 1`` only after it has read the slots of ``n``.
- Each rank adds the slots up in rank order, so all get the same bits.

It asks of memory that stores of one processor are seen in their order, which x86 gives and others do not: on
those, between hosts, and for tensors elsewhere than on the CPU, the process group does the work. The tests run the
protocol itself through every order in which ranks may take their steps and their stores may become visible.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from autotp.utils.hashing import stable_hash

__all__ = ["AbsentError", "Board", "exchange"]

LINE = 64
"""Bytes of a cache line: counters lie on lines of their own, so that no rank's store takes another's line away."""
SLOT = 1 << 20
"""Bytes that a rank can say at once; more is said in several exchanges."""


class AbsentError(RuntimeError):
    """A rank does not come to an exchange, or has given up one."""


class Counters(Protocol):
    """Where each rank says how far it is."""

    size: int

    def publish(self, rank: int, number: int) -> None:
        """Set a rank's own counter, after everything that it stored before."""
        ...

    def published(self, rank: int) -> int:
        """A rank's counter."""
        ...


def exchange(
    counters: Counters, rank: int, number: int, write: Callable[[int], None], read: Callable[[int], None]
) -> Iterator[None]:
    """One rank's part in exchange ``number``, step by step: it stands still wherever another may go first.

    Args:
        counters: the ranks' counters, all of them at ``number - 1`` or ``number``.
        rank: this rank.
        number: 1 for the first exchange, and so on.
        write: fills this rank's slot 0 or 1.
        read: reads the ranks' slots 0 or 1.
    """
    write(number % 2)
    yield
    counters.publish(rank, number)
    for other in range(counters.size):
        while counters.published(other) < number:
            yield
    yield
    read(number % 2)


@dataclass(frozen=True)
class Slots:
    """All ranks' slots as tensors.

    Attributes:
        kind: a number for what is exchanged in this way.
        views: the tensors in the ranks' slots 0 and 1.
    """

    kind: int
    views: tuple[list[torch.Tensor], ...]


class Board:
    """The memory that ``size`` ranks map: their counters, a word each on what they exchange, and their slots.

    Args:
        memory: of :meth:`bytes_of` bytes, zeros at first.
        rank: this rank.
        size: the number of ranks.
        slot: bytes of a slot.
        timeout: how long to wait for the others.
    """

    def __init__(self, memory: mmap.mmap, rank: int, size: int, slot: int, timeout: timedelta) -> None:
        self.memory, self.rank, self.size, self.slot, self.timeout = memory, rank, size, slot, timeout
        self.number, self.broken = 0, False
        self._words = memoryview(memory).cast("q")
        self._slots: dict[Any, Slots] = {}
        self._patience = 300 if len(os.sched_getaffinity(0)) >= size else 20
        self._words[self._line(rank) + 3] = os.getpid()

    @staticmethod
    def bytes_of(size: int, slot: int) -> int:
        """How much memory a board of so many ranks takes."""
        return 2 * LINE * size + 2 * size * slot

    def _line(self, rank: int) -> int:
        """A rank's second line: what it exchanges in slots 0 and 1, whether it has given up, its process."""
        return (2 * rank + 1) * LINE // 8

    def publish(self, rank: int, number: int) -> None:
        """Set a rank's counter."""
        self._words[2 * rank * LINE // 8] = number

    def published(self, rank: int) -> int:
        """A rank's counter."""
        return self._words[2 * rank * LINE // 8]

    def slots(self, what: str, dtype: torch.dtype, shapes: tuple[Sequence[int], ...]) -> Slots:
        """The ranks' slots as tensors of these shapes, one a rank."""
        found = self._slots.get((what, dtype, shapes))
        if found is None:
            if len(self._slots) > 4096:
                self._slots.clear()
            kind = stable_hash(f"{what} {dtype} {[tuple(s) for s in shapes]}")
            with torch.inference_mode(False):
                views = tuple([self._view(dtype, s, 2 * r + at) for r, s in enumerate(shapes)] for at in (0, 1))
            found = self._slots[what, dtype, shapes] = Slots(kind, views)
        return found

    def _view(self, dtype: torch.dtype, shape: Sequence[int], number: int) -> torch.Tensor:
        start, count = 2 * LINE * self.size + number * self.slot, int(torch.Size(shape).numel())
        if not count:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=start).view(shape)

    def same(self, word: int) -> bool:
        """Whether all ranks say the same number of 62 bits."""
        start, step = 2 * LINE // 8 * self.size, self.slot // 8
        found: list[int] = []

        def write(at: int) -> None:
            self._words[start + (2 * self.rank + at) * step] = word

        def read(at: int) -> None:
            found.extend(self._words[start + (2 * r + at) * step] for r in range(self.size))

        self.run(0, write, read)
        return all(each == word for each in found)

    def run(self, kind: int, write: Callable[[int], None], read: Callable[[int], None]) -> None:
        """Take part in the next exchange.

        Args:
            kind: what is exchanged, as a number that is the same on all ranks.
            write: fills this rank's slot 0 or 1.
            read: reads all ranks' slots 0 or 1.

        A rank in which an exchange fails says so, and takes part in none again: the others' next one fails too.

        Raises:
            AbsentError: the others have not come within the timeout, or an exchange has failed on one before.
            RuntimeError: they exchange something else.
        """
        self.finish(self.begin(kind, write, read))

    def begin(self, kind: int, write: Callable[[int], None], read: Callable[[int], None]) -> Iterator[None]:
        """The first half of :meth:`run`: this rank has said what it has to say, and has waited for nobody."""
        if self.broken:
            raise AbsentError("an exchange through memory failed before: start the processes anew")

        def write_and_say(at: int) -> None:
            write(at)
            self._words[self._line(self.rank) + at] = kind

        def check_and_read(at: int) -> None:
            self._look()
            for other in range(self.size):
                if self._words[self._line(other) + at] != kind:
                    raise RuntimeError(f"rank {other} of {self.size} exchanges something else")
            read(at)

        self.number += 1
        steps = exchange(self, self.rank, self.number, write_and_say, check_and_read)
        try:
            next(steps)
            next(steps)  # to where it waits, or would read
        except BaseException:
            self._give_up()
            raise
        return steps

    def finish(self, steps: Iterator[None]) -> None:
        """The second half of :meth:`run`: wait for the others, and read. No other exchange may come between."""
        try:
            for waited, _ in enumerate(steps):
                if waited > self._patience:
                    self._wait(waited - self._patience)
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        self.broken = True
        self._words[self._line(self.rank) + 2] = 1

    def _look(self) -> None:
        """Raise if a rank has given up."""
        for other in range(self.size):
            if self._words[self._line(other) + 2]:
                raise AbsentError(f"rank {other} of {self.size} has given up an exchange through memory")

    def _wait(self, times: int) -> None:
        """Let others run: at once at first, then for longer and longer."""
        if times == 1:
            self._deadline = time.monotonic() + self.timeout.total_seconds()
        if times < 1000:
            os.sched_yield()
            return
        time.sleep(min(1e-3, 2e-5 * (times - 999)))
        self._look()
        late = [r for r in range(self.size) if self.published(r) < self.number]
        if times % 256 == 0:
            for other in late:
                process = self._words[self._line(other) + 3]  # 0: it has not said yet which it is
                if process and _has_ended(process):
                    raise AbsentError(f"the process of rank {other} has ended")
        if time.monotonic() > self._deadline:
            raise AbsentError(f"timed out after {self.timeout.total_seconds():g} s waiting for {late} in memory")


def _has_ended(process: int) -> bool:
    """Whether a process of this host is gone, or only waits for its parent to notice that it has ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in ("Z", "X")
