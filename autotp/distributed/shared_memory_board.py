"""shared_memory_board: the mapped memory and the protocol by which CPU ranks of one host exchange values.

A reduction of a few KiB between two processes takes gloo half a millisecond, which is the time of sockets and threads;
moving the data takes a microsecond. Here each rank writes its value into a slot of its own and then raises a counter of
its own. It reads the other ranks' slots once their counters are as high.

The protocol (:func:`exchange`) has no lock and nothing that two ranks write:

- exchange ``n`` uses slot ``n % 2`` of each rank. A rank fills its slot, then sets its counter to ``n``, waits until
  every counter is ``n`` or more, and reads all slots.
- Two slots are enough. A rank that fills its slot for ``n + 2`` has seen every counter reach ``n + 1``, and
  a rank sets ``n + 1`` only after it has read the slots of ``n``.
- Each rank adds the slots up in rank order, so all get the same bits.

The protocol needs memory in which other processors see the stores of one in their order. x86 guarantees that, other
machines do not. On those, between hosts, and for tensors on other devices, the process group does the work. The tests
run the protocol itself through every order in which ranks may take their steps and their stores may become visible.
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
"""Bytes of a slot, the most that a rank can write in one exchange; larger values take several exchanges."""


class AbsentError(RuntimeError):
    """A rank does not join an exchange, or has given up one."""


class Counters(Protocol):
    """One counter a rank: the number of its last exchange."""

    size: int

    def publish(self, rank: int, number: int) -> None:
        """Set a rank's own counter; others see it only after everything that the rank stored before."""
        ...

    def published(self, rank: int) -> int:
        """A rank's counter."""
        ...


def exchange(
    counters: Counters, rank: int, number: int, write: Callable[[int], None], read: Callable[[int], None]
) -> Iterator[None]:
    """Run one rank's side of exchange ``number``, step by step: it yields wherever another rank may go first.

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
        kind: a hash of the operation, dtype and shapes.
        views: for slots 0 and 1, the ranks' tensors in them.
    """

    kind: int
    views: tuple[list[torch.Tensor], ...]


class Board:
    """The memory that ``size`` ranks map: their counters, the kinds of their exchanges, and their slots.

    Args:
        memory: the mapped memory, of :meth:`bytes_of` bytes, zeros at first.
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
        """The size in bytes of a board for so many ranks."""
        return 2 * LINE * size + 2 * size * slot

    def _line(self, rank: int) -> int:
        """The index of a rank's second line: the kinds of slots 0 and 1, whether it has given up, its process's id."""
        return (2 * rank + 1) * LINE // 8

    def publish(self, rank: int, number: int) -> None:
        """Set a rank's counter."""
        self._words[2 * rank * LINE // 8] = number

    def published(self, rank: int) -> int:
        """A rank's counter."""
        return self._words[2 * rank * LINE // 8]

    def slots(self, what: str, dtype: torch.dtype, shapes: tuple[Sequence[int], ...]) -> Slots:
        """The ranks' slots as tensors, with one shape a rank; ``what`` names the operation."""
        slots = self._slots.get((what, dtype, shapes))
        if slots is None:
            if len(self._slots) > 4096:
                self._slots.clear()
            kind = stable_hash(f"{what} {dtype} {[tuple(s) for s in shapes]}")
            with torch.inference_mode(False):
                views = tuple([self._view(dtype, s, 2 * r + at) for r, s in enumerate(shapes)] for at in (0, 1))
            slots = self._slots[what, dtype, shapes] = Slots(kind, views)
        return slots

    def _view(self, dtype: torch.dtype, shape: Sequence[int], number: int) -> torch.Tensor:
        start, count = 2 * LINE * self.size + number * self.slot, int(torch.Size(shape).numel())
        if not count:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=start).view(shape)

    def same(self, word: int) -> bool:
        """Whether all ranks have the same word of 62 bits."""
        start, step = 2 * LINE // 8 * self.size, self.slot // 8
        words: list[int] = []

        def write(at: int) -> None:
            self._words[start + (2 * self.rank + at) * step] = word

        def read(at: int) -> None:
            words.extend(self._words[start + (2 * r + at) * step] for r in range(self.size))

        self.run(0, write, read)
        return all(other == word for other in words)

    def run(self, kind: int, write: Callable[[int], None], read: Callable[[int], None]) -> None:
        """Take part in the next exchange.

        Args:
            kind: the kind of exchange, as a number that is the same on all ranks.
            write: fills this rank's slot 0 or 1.
            read: reads all ranks' slots 0 or 1.

        A rank on which an exchange fails tells the others, and takes part in no other: their next exchange fails too.

        Raises:
            AbsentError: a rank has not come within the timeout, or an exchange has failed on one before.
            RuntimeError: the ranks' kinds differ.
        """
        self.finish(self.begin(kind, write, read))

    def begin(self, kind: int, write: Callable[[int], None], read: Callable[[int], None]) -> Iterator[None]:
        """The first half of :meth:`run`: write this rank's slot, without waiting for any rank."""
        if self.broken:
            raise AbsentError("an exchange through memory failed before: start the processes anew")

        def write_with_kind(at: int) -> None:
            write(at)
            self._words[self._line(self.rank) + at] = kind

        def check_and_read(at: int) -> None:
            self._check_others()
            for other in range(self.size):
                if self._words[self._line(other) + at] != kind:
                    raise RuntimeError(f"rank {other} of {self.size} exchanges something else")
            read(at)

        self.number += 1
        steps = exchange(self, self.rank, self.number, write_with_kind, check_and_read)
        try:
            next(steps)
            next(steps)  # to where it waits, or would read
        except BaseException:
            self._give_up()
            raise
        return steps

    def finish(self, steps: Iterator[None]) -> None:
        """The second half of :meth:`run`: wait for the others, and read. No other exchange may begin in between."""
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

    def _check_others(self) -> None:
        """Raise if a rank has given up."""
        for other in range(self.size):
            if self._words[self._line(other) + 2]:
                raise AbsentError(f"rank {other} of {self.size} has given up an exchange through memory")

    def _wait(self, times: int) -> None:
        """Let other processes run: at first only for a moment, then for longer and longer."""
        if times == 1:
            self._deadline = time.monotonic() + self.timeout.total_seconds()
        if times < 1000:
            os.sched_yield()
            return
        time.sleep(min(1e-3, 2e-5 * (times - 999)))
        self._check_others()
        late = [r for r in range(self.size) if self.published(r) < self.number]
        if times % 256 == 0:
            for other in late:
                process = self._words[self._line(other) + 3]  # 0: not written yet
                if process and _has_ended(process):
                    raise AbsentError(f"the process of rank {other} has ended")
        if time.monotonic() > self._deadline:
            raise AbsentError(f"timed out after {self.timeout.total_seconds():g} s waiting for {late} in memory")


def _has_ended(process: int) -> bool:
    """Whether a process of this host has ended; its parent may not have noticed yet."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in ("Z", "X")
