"""shared_memory: collectives between CPU ranks of one host, through memory that all of them map."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autotp.distributed.shared_memory_board import SLOT, AbsentError, Board

__all__ = ["SharedMemory", "host", "join_board"]


class SharedMemory:
    """One rank's end of a group on one host: CPU tensors go through memory.

    Tensors on other devices, and gathers of more than a slot, go through the process group.

    Args:
        board: the memory.
        fallback: this rank's end of the process group.
        missing: returns the error to raise where a rank does not join an exchange.
    """

    def __init__(self, board: Board, fallback: Any, missing: Callable[[Exception], Exception]) -> None:
        self.board, self.fallback, self.missing = board, fallback, missing
        self.rank, self.size = board.rank, board.size
        self.by_host = fallback.by_host  # CUDA graphs hold no CPU tensors

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, all of one shape."""
        if tensor.device.type != "cpu":
            return self.fallback.all_reduce(tensor)
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        most = self.board.slot // tensor.element_size()
        if tensor.numel() <= most:
            return self._sum(tensor, out)
        flat = tensor.reshape(-1)
        for piece, total in zip(flat.split(most), out.view(-1).split(most), strict=True):
            self._sum(piece, total)
        return out

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same sum, in the memory of ``tensor`` if that is contiguous."""
        return self.start_all_reduce(tensor)()

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin :meth:`all_reduce_`, and return a function that waits for the sum and returns it."""
        if tensor.device.type != "cpu":
            return self.fallback.start_all_reduce(tensor)
        tensor = tensor.contiguous()
        most = self.board.slot // tensor.element_size()
        pieces = [tensor] if tensor.numel() <= most else tensor.view(-1).split(most)
        first = self._begin_sum(pieces[0], pieces[0])

        def finish() -> torch.Tensor:
            self._finish(first)
            for piece in pieces[1:]:
                self._sum(piece, piece)
            return tensor

        return finish

    def _sum(self, tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self._finish(self._begin_sum(tensor, out))
        return out

    def _begin_sum(self, tensor: torch.Tensor, out: torch.Tensor) -> Iterator[None]:
        slots = self.board.slots("sum", tensor.dtype, (tensor.shape,) * self.size)

        def write(at: int) -> None:
            slots.views[at][self.rank].copy_(tensor.detach())

        def read(at: int) -> None:
            first, second, *rest = slots.views[at]
            torch.add(first, second, out=out)
            for view in rest:
                out.add_(view)

        try:
            return self.board.begin(slots.kind, write, read)
        except AbsentError as failure:
            raise self.missing(failure) from failure

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The ranks' tensors in rank order; ``shapes`` gives the shape of each."""
        sizes = tuple(tuple(s) for s in shapes)
        most = max(torch.Size(s).numel() for s in sizes) * tensor.element_size()
        if tensor.device.type != "cpu" or most > self.board.slot:
            return self.fallback.all_gather(tensor, shapes)
        slots = self.board.slots("gather", tensor.dtype, sizes)
        tensors: list[torch.Tensor] = []

        def write(at: int) -> None:
            slots.views[at][self.rank].copy_(tensor.detach())

        def read(at: int) -> None:
            tensors.extend(view.clone() for view in slots.views[at])

        try:
            self._finish(self.board.begin(slots.kind, write, read))
        except AbsentError as failure:
            raise self.missing(failure) from failure
        return tensors

    def _finish(self, steps: Iterator[None]) -> None:
        try:
            self.board.finish(steps)
        except AbsentError as failure:
            raise self.missing(failure) from failure


def _memory_domain() -> tuple[str, ...] | None:
    """An identity that ranks have in common if they can exchange values through memory; None if this rank cannot."""
    return host() if platform.machine() in ("x86_64", "AMD64") else None


def host() -> tuple[str, ...] | None:
    """An identity that processes have in common if they can see each other and each other's files; None if unknown."""
    if sys.platform != "linux":
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def join_board(group: dist.ProcessGroup, rank: int, size: int, timeout: timedelta, slot: int = SLOT) -> Board | None:
    """Map memory together with the other ranks of a group; None on all ranks if one cannot. Collective.

    The file behind the memory is unlinked as soon as all ranks have it open. So it vanishes with the last process,
    however that ends. Its space is allocated at once, so that it cannot run out later.
    """

    def gathered(value: Any) -> list[Any]:
        values: list[Any] = [None] * size
        dist.all_gather_object(values, value, group=group)
        return values

    domains = gathered(_memory_domain())
    if domains[0] is None or any(domain != domains[0] for domain in domains):
        return None
    path, memory, token = "", None, secrets.token_bytes(16)
    count = Board.bytes_of(size, slot)
    if rank == 0:
        with contextlib.suppress(OSError, ValueError):
            directory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
            handle, path = tempfile.mkstemp(prefix="autotp-", dir=directory)
            memory = _map_file(handle, count, token)
    try:
        offered, token = gathered((path if memory is not None else "", token))[0]
        if rank and offered:
            with contextlib.suppress(OSError, ValueError):
                memory = _map_file(os.open(offered, os.O_RDWR), count)
        is_mapped = memory is not None and memory[-16:] == token
        all_mapped = all(gathered(is_mapped))
    finally:
        if rank == 0 and path:
            os.unlink(path)
    if not all_mapped or memory is None:
        return None
    return Board(memory, rank, size, slot, timeout)


def _map_file(handle: int, count: int, token: bytes = b"") -> mmap.mmap:
    """Map a file; with a token, the file is new, and its space is allocated with the token at the end."""
    try:
        if token:
            os.posix_fallocate(handle, 0, count + len(token))
        memory = mmap.mmap(handle, count + 16)
    finally:
        os.close(handle)
    if token:
        memory[-16:] = token
    return memory
