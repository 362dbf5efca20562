"""Exchanges through memory: the protocol through every order of its steps, and real processes.

A step reads, or writes, all that it does at once; the protocol stands still between its steps.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from autotp.distributed.shared_memory_board import LINE, AbsentError, Board, _has_ended, exchange
from tests import processes
from tests.distributed import ranks

Store = tuple[str, int, int, int]
"""What is stored: a counter or a slot, of which rank, which slot, the value."""


def _said(rank: int, number: int) -> int:
    return 10 * number + rank


@dataclass
class Memory:
    """Memory in which a rank's stores wait in a buffer before others see them, as on x86 (total store order).

    Attributes:
        size: the number of ranks.
        counters: what all can see.
        slots: likewise, per rank and slot.
        buffers: per rank the stores that only it sees yet, in their order.
        read: what each rank has read, per exchange.
    """

    size: int
    counters: list[int] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    buffers: list[list[Store]] = field(default_factory=list)
    read: list[list[list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counters, self.slots = [0] * self.size, [[0, 0] for _ in range(self.size)]
        self.buffers, self.read = [[] for _ in range(self.size)], [[] for _ in range(self.size)]

    def store(self, rank: int, what: str, at: int, value: int) -> None:
        self.buffers[rank].append((what, rank, at, value))

    def flush(self, rank: int, place: int) -> None:
        what, of, at, value = self.buffers[rank].pop(place)
        if what == "counter":
            self.counters[of] = value
        else:
            self.slots[of][at] = value

    def seen(self, rank: int, what: str, of: int, at: int) -> int:
        own = [v for w, r, a, v in self.buffers[rank] if (w, r, a) == (what, of, at)]
        return own[-1] if own else self.counters[of] if what == "counter" else self.slots[of][at]


@dataclass
class View:
    """One rank's view of the counters."""

    memory: Memory
    rank: int

    @property
    def size(self) -> int:
        return self.memory.size

    def publish(self, rank: int, number: int) -> None:
        self.memory.store(rank, "counter", 0, number)

    def published(self, rank: int) -> int:
        return self.memory.seen(self.rank, "counter", rank, 0)


Protocol = Callable[[View, int, int, Callable[[int], None], Callable[[int], None]], Iterator[None]]


def _run(memory: Memory, rank: int, times: int, protocol: Protocol) -> Iterator[None]:
    for number in range(1, times + 1):

        def write(at: int, number: int = number) -> None:
            memory.store(rank, "slot", at, _said(rank, number))

        def read(at: int) -> None:
            memory.read[rank].append([memory.seen(rank, "slot", r, at) for r in range(memory.size)])

        yield from protocol(View(memory, rank), rank, number, write, read)


def _where(steps: Any) -> tuple[Any, ...]:
    """Where a rank stands, down through the generators that it waits in."""
    found = []
    while steps is not None and getattr(steps, "gi_frame", None) is not None:
        known = steps.gi_frame.f_locals
        found.append((steps.gi_frame.f_lasti, known.get("number"), known.get("other")))
        steps = steps.gi_yieldfrom
    return tuple(found)


def explored(size: int, times: int, protocol: Protocol = exchange, in_order: bool = True) -> tuple[int, str]:
    """How many states there are, and what goes wrong in the first in which something does.

    Every order of the ranks' steps and of their stores' becoming visible; out of order where stores may overtake.
    """
    before: dict[Any, set[Any]] = {}
    ends, waiting = list[Any](), list[tuple[tuple[Any, ...], Any]]([((), None)])
    while waiting:
        schedule, last = waiting.pop()
        memory = Memory(size)
        ranks = [_run(memory, rank, times, protocol) for rank in range(size)]
        done = set()
        for rank, place in schedule:
            if place is not None:
                memory.flush(rank, place)
            elif next(ranks[rank], "done") == "done":
                done.add(rank)
        for rank, every in enumerate(memory.read):
            for number, found in enumerate(every, 1):
                if found != [_said(r, number) for r in range(size)]:
                    return len(before), f"rank {rank} reads {found} in exchange {number}"
        state = (
            tuple(memory.counters), str(memory.slots), str(memory.buffers), tuple(map(_where, ranks)), str(memory.read)
        )  # fmt: skip
        known = state in before
        before.setdefault(state, set()).add(last)
        if known:
            continue
        if len(done) == size:
            ends.append(state)
        waiting += [((*schedule, (rank, None)), state) for rank in range(size) if rank not in done]
        for rank, buffer in enumerate(memory.buffers):
            places = range(len(buffer)) if not in_order else range(min(1, len(buffer)))
            waiting += [((*schedule, (rank, place)), state) for place in places]
    come_to_an_end = set(ends)
    while ends:
        new = before[ends.pop()] - come_to_an_end - {None}
        come_to_an_end |= new
        ends += new
    stuck = len(before) - len(come_to_an_end)
    return len(before), f"{stuck} states from which no order of steps comes to an end" if stuck else ""


@pytest.mark.parametrize(("size", "times"), [(2, 5), (3, 3)])
def test_every_order_of_steps_and_stores_gives_what_was_said(size: int, times: int) -> None:
    count, wrong = explored(size, times)
    assert not wrong
    assert count > 100


def _one_slot(view: View, rank: int, number: int, write: Any, read: Any) -> Iterator[None]:
    return exchange(view, rank, number, lambda at: write(0), lambda at: read(0))


def _early(view: View, rank: int, number: int, write: Any, read: Any) -> Iterator[None]:
    view.publish(rank, number)
    yield from exchange(view, rank, number, write, read)


def _impatient(view: View, rank: int, number: int, write: Any, read: Any) -> Iterator[None]:
    write(number % 2)
    yield
    view.publish(rank, number)
    yield
    read(number % 2)


def _polite(view: View, rank: int, number: int, write: Any, read: Any) -> Iterator[None]:
    write(number % 2)
    yield
    while view.published((rank + 1) % view.size) < number:
        yield
    view.publish(rank, number)
    read(number % 2)


def _acknowledged_early(view: View, rank: int, number: int, write: Any, read: Any) -> Iterator[None]:
    """One slot, and a second round of counters that says it has been read, but is said before it has."""
    for step in (2 * number - 1, 2 * number):
        if step % 2:
            write(0)
        yield
        view.publish(rank, step)
        for other in range(view.size):
            while view.published(other) < step:
                yield
    yield
    read(0)


@pytest.mark.parametrize("protocol", [_acknowledged_early, _one_slot, _early, _impatient])
def test_a_worse_protocol_is_found_out(protocol: Protocol) -> None:
    _, wrong = explored(2, 3, protocol)
    assert "reads" in wrong


def test_ranks_that_wait_for_each_other_are_found_out() -> None:
    _, wrong = explored(2, 1, _polite)
    assert "no order of steps comes to an end" in wrong


def test_it_needs_stores_that_are_seen_in_their_order() -> None:
    _, wrong = explored(2, 2, in_order=False)
    assert "reads" in wrong


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.run(request.param, ranks.exchanges, out=tmp_path_factory.mktemp("memory"))


def test_sums_and_gathers_are_those_of_the_process_group(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert "error" not in found, found["error"]
        assert found["through memory"] > 100
        assert found["worst"] < 1e-6
        assert found["same bits"]


def test_nothing_is_left_behind(results: list[dict[str, Any]]) -> None:
    deadline = time.monotonic() + 20  # tests beside this one are about to unlink theirs
    while (left := list(Path("/dev/shm").glob("autotp-*"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_ranks_that_exchange_different_things_are_told(results: list[dict[str, Any]]) -> None:
    said = [found["different"] for found in results]
    assert any("exchanges something else" in each for each in said)
    assert all("exchanges something else" in each or "has given up" in each for each in said)


def test_a_rank_that_does_not_come_is_named(results: list[dict[str, Any]]) -> None:
    last = len(results) - 1
    for found in results[:-1]:
        assert f"waiting for [{last}]" in found["late"] or "has given up" in found["late"]
    assert any(f"waiting for [{last}]" in found["late"] for found in results[:-1])


def test_no_rank_goes_on_after_an_exchange_that_failed(results: list[dict[str, Any]]) -> None:
    """A late rank must not take the sum that another has given up, nor later ones be off by one."""
    for found in results:
        assert "given up" in found["after"] or "failed before" in found["after"]


def test_a_rank_that_has_not_said_its_process_has_not_ended() -> None:
    """It may still be starting: only time tells."""
    memory = mmap.mmap(-1, Board.bytes_of(2, LINE) + 16)
    board = Board(memory, 0, 2, LINE, timedelta(seconds=0.5))
    with pytest.raises(AbsentError, match=r"timed out after 0.5 s waiting for \[1\]"):
        board.same(7)


def test_a_process_that_has_ended_is_named_at_once(tmp_path: Path) -> None:
    results = processes.run(2, ranks.ends, out=tmp_path)
    assert results[0]["said"] == "the process of rank 1 has ended"
    assert results[0]["seconds"] < 20


def test_a_process_that_nobody_has_buried_has_ended() -> None:
    """A launcher that looks after its processes in turn may be a while in noticing."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not _has_ended(process.pid)
    process.kill()
    deadline = time.monotonic() + 30
    while not _has_ended(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.path.exists(f"/proc/{process.pid}"), "it is not reaped yet"
    assert _has_ended(process.pid)
    process.communicate()
    assert not os.path.exists(f"/proc/{process.pid}")
    assert _has_ended(process.pid)
