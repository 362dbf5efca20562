"""shared_memory: collectives between CPU ranks of one host through memory that they map."""

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
    """One rank's end of a group on one host: CPU tensors through memory, others through the process group, and so
    are gathers of more than a slot.

    Args:
        board: the memory.
        far: the process group's end.
        missing: makes the error of an exchange to which a rank does not come.
    """

    def __init__(self, board: Board, far: Any, missing: Callable[[Exception], Exception]) -> None:
        self.board, self.far, self.missing = board, far, missing
        self.rank, self.size, self.by_host = board.rank, board.size, far.by_host  # CUDA graphs hold no CPU tensors

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, all of one shape."""
        if tensor.device.type != "cpu":
            return self.far.all_reduce(tensor)
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        most = self.board.slot // tensor.element_size()
        if tensor.numel() <= most:
            return self._sum(tensor, out)
        flat = tensor.reshape(-1)
        for mine, total in zip(flat.split(most), out.view(-1).split(most), strict=True):
            self._sum(mine, total)
        return out

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same, in the memory of ``tensor`` if that has no gaps."""
        return self.start_all_reduce(tensor)()

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin :meth:`all_reduce_`; what it returns waits for the sum, and gives it."""
        if tensor.device.type != "cpu":
            return self.far.start_all_reduce(tensor)
        tensor = tensor.contiguous()
        most = self.board.slot // tensor.element_size()
        parts = [tensor] if tensor.numel() <= most else tensor.view(-1).split(most)
        first = self._begin_sum(parts[0], parts[0])

        def finish() -> torch.Tensor:
            self._finish(first)
            for part in parts[1:]:
                self._sum(part, part)
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
            for each in rest:
                out.add_(each)

        try:
            return self.board.begin(slots.kind, write, read)
        except AbsentError as failure:
            raise self.missing(failure) from failure

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The ranks' tensors in rank order; ``shapes`` says what shape each has."""
        sizes = tuple(tuple(s) for s in shapes)
        most = max(torch.Size(s).numel() for s in sizes) * tensor.element_size()
        if tensor.device.type != "cpu" or most > self.board.slot:
            return self.far.all_gather(tensor, shapes)
        slots = self.board.slots("gather", tensor.dtype, sizes)
        found: list[torch.Tensor] = []

        def write(at: int) -> None:
            slots.views[at][self.rank].copy_(tensor.detach())

        def read(at: int) -> None:
            found.extend(each.clone() for each in slots.views[at])

        try:
            self._finish(self.board.begin(slots.kind, write, read))
        except AbsentError as failure:
            raise self.missing(failure) from failure
        return found

    def _finish(self, steps: Iterator[None]) -> None:
        try:
            self.board.finish(steps)
        except AbsentError as failure:
            raise self.missing(failure) from failure


def _place() -> tuple[str, ...] | None:
    """What ranks that can share memory have in common; None where memory would not do."""
    return host() if platform.machine() in ("x86_64", "AMD64") else None


def host() -> tuple[str, ...] | None:
    """What processes have in common that can open each other's files and see each other; None where it is not known."""
    if sys.platform != "linux":
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def join_board(group: dist.ProcessGroup, rank: int, size: int, timeout: timedelta, slot: int = SLOT) -> Board | None:
    """Map memory with the other ranks of a group; None on all of them where they cannot. Collective.

    The file behind it is unlinked as soon as all have it open, so it goes when the last process does, however that
    ends; its space is taken at once, so that it cannot run out later.
    """

    def gathered(value: Any) -> list[Any]:
        found: list[Any] = [None] * size
        dist.all_gather_object(found, value, group=group)
        return found

    places = gathered(_place())
    if places[0] is None or any(p != places[0] for p in places):
        return None
    path, memory, token = "", None, secrets.token_bytes(16)
    count = Board.bytes_of(size, slot)
    if rank == 0:
        with contextlib.suppress(OSError, ValueError):
            directory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
            handle, path = tempfile.mkstemp(prefix="autotp-", dir=directory)
            memory = _mapped(handle, count, token)
    try:
        offered, token = gathered((path if memory is not None else "", token))[0]
        if rank and offered:
            with contextlib.suppress(OSError, ValueError):
                memory = _mapped(os.open(offered, os.O_RDWR), count)
        mine = memory is not None and memory[-16:] == token
        all_mapped = all(gathered(mine))
    finally:
        if rank == 0 and path:
            os.unlink(path)
    if not all_mapped or memory is None:
        return None
    return Board(memory, rank, size, slot, timeout)


def _mapped(handle: int, count: int, token: bytes = b"") -> mmap.mmap:
    """A file's memory; of a new file, with all its space taken and a token at its end."""
    try:
        if token:
            os.posix_fallocate(handle, 0, count + len(token))
        memory = mmap.mmap(handle, count + 16)
    finally:
        os.close(handle)
    if token:
        memory[-16:] = token
    return memory
