"""threads: ranks as threads of one process, and the communicators that join them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from autotp.distributed.random_state import draw_from
from passes.ops import context
from passes.ops.context import use_context

__all__ = ["lockstep"]


class _Exchange:
    """Where the threads of a group exchange tensors: a slot for each and a barrier."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.slots[rank] = tensor
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class _ThreadCommunicator:
    """One rank's end of a group of threads. Sums run in rank order, so that all get the same bits."""

    def __init__(self, rank: int, size: int, meeting: _Exchange) -> None:
        self.rank, self.size, self.by_host, self._meeting = rank, size, True, meeting

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._meeting.exchange(self.rank, tensor.detach())
        assert len({p.shape for p in parts}) == 1, f"all_reduce of shapes {[tuple(p.shape) for p in parts]}"
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    all_reduce_ = all_reduce  # others may still read this one's tensor

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return partial(self.all_reduce, tensor)

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        parts = self._meeting.exchange(self.rank, tensor.detach())
        assert all(tuple(p.shape) == tuple(s) for p, s in zip(parts, shapes, strict=True))
        return parts


class World:
    """The shared state of a simulation's threads, and each one's fabric."""

    _default_generator = threading.Lock()

    def __init__(self, tp: int) -> None:
        self.tp = tp
        self.meetings: dict[Any, _Exchange] = {}
        self.lock = threading.Lock()
        self.broken = False
        self.restart(torch.initial_seed() % 2**62)

    def restart(self, seed: int) -> None:
        """Start all ranks' streams of random numbers anew."""
        self.seed, self.streams = seed, dict[tuple[int, bool], torch.Tensor]()

    def meeting(self, key: Any, size: int) -> _Exchange:
        with self.lock:
            if self.broken:  # a rank has failed: nobody would come
                raise threading.BrokenBarrierError
            return self.meetings.setdefault(key, _Exchange(size))

    def abort(self) -> None:
        with self.lock:
            self.broken = True
            for meeting in self.meetings.values():
                meeting.barrier.abort()

    def mend(self) -> None:
        """Make the world fit for another run, after one in which a rank failed."""
        self.meetings.clear()
        self.broken = False


class _ThreadContext:
    def __init__(self, rank: int, world: World) -> None:
        self.rank, self.world = rank, world

    def group(self, name: str) -> context.Communicator:
        _, parts = context.parse_group(name)
        members = next((p for p in parts if self.rank in p), None) if parts else list(range(self.world.tp))
        assert members is not None
        meeting = self.world.meeting((name, tuple(members)), len(members))
        return _ThreadCommunicator(members.index(self.rank), len(members), meeting)

    @contextlib.contextmanager
    def random(self, same: bool, device: torch.device) -> Iterator[None]:
        seed = self.world.seed + (0 if same else 1 + self.rank)
        with World._default_generator, draw_from(self.world.streams, (self.rank, same), torch.device("cpu"), seed):
            yield


def lockstep(tp: int, world: World, work: Callable[[int], Any]) -> list[Any]:
    """Run ``work(rank)`` for every rank, each in a thread of its own and a fabric that joins them.

    The first rank's error, if any fails, is raised here.
    """
    results: list[Any] = [None] * tp
    errors: list[tuple[int, BaseException]] = []
    grad = torch.is_grad_enabled()

    def run(rank: int) -> None:
        try:
            with use_context(_ThreadContext(rank, world)), torch.set_grad_enabled(grad):
                results[rank] = work(rank)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # raised again below, in the caller's thread
            errors.append((rank, error))
            world.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        world.mend()
        raise min(errors, key=lambda e: e[0])[1]
    return results
