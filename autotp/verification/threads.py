"""threads: ranks as threads of one process, and their communicators."""

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
    """The exchange of tensors between the threads of a group: a slot for each thread, and a barrier."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all threads, in the order of ranks."""
        self.slots[rank] = tensor
        self.barrier.wait()
        tensors = list(self.slots)
        self.barrier.wait()
        return tensors


class _ThreadCommunicator:
    """A rank's communicator in a group of threads. Sums run in the order of ranks, so that all get the same bits."""

    def __init__(self, rank: int, size: int, exchange: _Exchange) -> None:
        self.rank, self.size, self.by_host, self._exchange = rank, size, True, exchange

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensors = self._exchange.exchange(self.rank, tensor.detach())
        assert len({t.shape for t in tensors}) == 1, f"all_reduce of shapes {[tuple(t.shape) for t in tensors]}"
        total = tensors[0].clone()
        for summand in tensors[1:]:
            total += summand
        return total

    all_reduce_ = all_reduce  # not in place: other threads may still read this one's tensor

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return partial(self.all_reduce, tensor)

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        shards = self._exchange.exchange(self.rank, tensor.detach())
        assert all(tuple(t.shape) == tuple(s) for t, s in zip(shards, shapes, strict=True))
        return shards


class World:
    """The state that the threads of a simulation share: their exchanges and streams of random numbers."""

    _default_generator = threading.Lock()

    def __init__(self, tp: int) -> None:
        self.tp = tp
        self.exchanges: dict[Any, _Exchange] = {}
        self.lock = threading.Lock()
        self.broken = False
        self.restart(torch.initial_seed() % 2**62)

    def restart(self, seed: int) -> None:
        """Restart all ranks' streams of random numbers from a seed."""
        self.seed, self.streams = seed, dict[tuple[int, bool], torch.Tensor]()

    def exchange(self, key: Any, size: int) -> _Exchange:
        """The exchange of a group."""
        with self.lock:
            if self.broken:  # a rank has failed: the others would wait for it
                raise threading.BrokenBarrierError
            return self.exchanges.setdefault(key, _Exchange(size))

    def abort(self) -> None:
        """Let all threads stop waiting, after a rank failed."""
        with self.lock:
            self.broken = True
            for exchange in self.exchanges.values():
                exchange.barrier.abort()

    def mend(self) -> None:
        """Allow another run after one in which a rank failed."""
        self.exchanges.clear()
        self.broken = False


class _ThreadContext:
    """A rank's groups and streams of random numbers."""

    def __init__(self, rank: int, world: World) -> None:
        self.rank, self.world = rank, world

    def group(self, name: str) -> context.Communicator:
        """This rank's communicator in a group."""
        _, partition = context.parse_group(name)
        members = next((m for m in partition if self.rank in m), None) if partition else list(range(self.world.tp))
        assert members is not None
        exchange = self.world.exchange((name, tuple(members)), len(members))
        return _ThreadCommunicator(members.index(self.rank), len(members), exchange)

    @contextlib.contextmanager
    def random(self, same: bool, device: torch.device) -> Iterator[None]:
        """Draw random numbers from this rank's stream, or from the stream that is the ``same`` on all ranks."""
        seed = self.world.seed + (0 if same else 1 + self.rank)
        with World._default_generator, draw_from(self.world.streams, (self.rank, same), torch.device("cpu"), seed):
            yield


def lockstep(tp: int, world: World, work: Callable[[int], Any]) -> list[Any]:
    """Run ``work(rank)`` for every rank, each in a thread of its own, and return the results by rank.

    If ranks fail, the error of the lowest one is raised.
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
