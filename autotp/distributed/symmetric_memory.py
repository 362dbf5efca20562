"""symmetric_memory: small sums between GPUs that NVLink joins, in one kernel.

NCCL's all-reduce of some KiB is latency: several steps between the ranks, one after another. torch's symmetric memory
has a kernel that does it in one: each rank's values lie where all others can read them; once all ranks have come, each
adds up what it reads, in rank order, so that all get the same bits (``torch.ops.symm_mem.one_shot_all_reduce_out``, of
:mod:`torch.distributed._symmetric_memory`). It reads every rank's values whole, so from some size on the ring of NCCL
is faster. It asks nothing of the host: a CUDA graph can hold it.

What goes which way depends on dtype and size alone, which the ranks have in common. The kernel waits for the other
ranks without a limit of time, so it is used only where it can be told beforehand that it works (:func:`_is_offered`,
:func:`_are_joined`), and then first on trial. A rank that dies within a call leaves the others waiting in it, on their
GPUs, until whoever started the processes ends them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from autotp.distributed.shared_memory import host
from autotp.utils.hashing import checksum

__all__ = ["SymmetricMemory", "join_symmetric_memory", "largest"]

_DTYPES = (torch.float32, torch.bfloat16)
"""What the kernel adds."""
_ALIGNMENT = 16
"""Bytes that it loads at once; it takes less, but the ranks must agree, and addresses are a rank's own."""


def largest(size: int) -> int:
    """The bytes up to which the kernel is used between so many ranks; 0: not at all.

    The limits are those of vLLM's kernel of the same kind, for GPUs that NVLink joins (csrc/custom_all_reduce.cuh):
    every rank reads what all others have, so they fall with the ranks.

    >>> largest(2), largest(8), largest(16)
    (524288, 262144, 0)
    """
    return 0 if size > 8 else (1 << 19 if size <= 4 else 1 << 18)


@dataclass
class _Shared:
    """What a group shares: per dtype the memory in which the others read this rank's values; the last stream that used
    it, since the kernel's own signals are not for two at a time."""

    buffers: dict[torch.dtype, torch.Tensor]
    device: torch.device
    stream: Any = None


_shared: dict[str, _Shared] = {}
"""By group, as long as the process lives: memory that ranks have mapped must not become another tensor's."""


class SymmetricMemory:
    """One rank's end of a group of GPUs: small sums in one kernel, all else through the process group.

    Args:
        shared: what the group shares.
        far: the process group's end.
    """

    def __init__(self, shared: _Shared, far: Any) -> None:
        self._shared, self._far, self._name = shared, far, far.group.group_name
        self.rank, self.size, self.by_host = far.rank, far.size, far.by_host

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether the kernel adds such tensors; the same on all ranks."""
        buffer = self._shared.buffers.get(tensor.dtype)
        if buffer is None or tensor.device != self._shared.device or not 0 < tensor.numel() <= buffer.numel():
            return False
        return tensor.numel() * tensor.element_size() % _ALIGNMENT == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, all of one shape."""
        if not self.takes(tensor):
            return self._far.all_reduce(tensor)
        return self._sum(tensor, tensor.new_empty(tensor.shape))

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same, in the memory of ``tensor`` if that has no gaps and lies where the kernel can write it."""
        if not self.takes(tensor):
            return self._far.all_reduce_(tensor)
        fits = tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0
        return self._sum(tensor, tensor if fits else tensor.new_empty(tensor.shape))

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin :meth:`all_reduce_`; what it returns waits for the sum, and gives it."""
        if not self.takes(tensor):
            return self._far.start_all_reduce(tensor)
        total = self.all_reduce_(tensor)
        return lambda: total

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The ranks' tensors in rank order; ``shapes`` says what shape each has."""
        return self._far.all_gather(tensor, shapes)

    def _sum(self, tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        mine = self._shared.buffers[tensor.dtype][: tensor.numel()].view(tensor.shape)
        with self._in_turn():
            mine.copy_(tensor.detach())  # not by the kernel: its warps would not wait for one another
            torch.ops.symm_mem.one_shot_all_reduce_out(mine, "sum", self._name, out.detach())
        return out

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """On the GPU, and after what another stream has begun to add up there."""
        device = self._shared.device
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            before = self._shared.stream
            if before is not None and before != stream and not torch.cuda.is_current_stream_capturing():
                stream.wait_stream(before)
            self._shared.stream = stream
            yield


def join_symmetric_memory(far: Any, device: torch.device) -> SymmetricMemory | None:
    """Share memory with the other ranks of a group of GPUs; None on all of them where they cannot. Collective.

    Args:
        far: this rank's end of the process group.
        device: this rank's GPU.
    """

    def gathered(value: Any) -> list[Any]:
        found: list[Any] = [None] * far.size
        dist.all_gather_object(found, value, group=far.group)
        return found

    if not largest(far.size):
        return None
    if (known := _shared.get(far.group.group_name)) is not None:
        return SymmetricMemory(known, far)
    # Each step by itself, and told to all: none may wait for one that has failed. torch has no class for its errors.
    place, joined, made = None, False, None
    with contextlib.suppress(Exception):
        place = (host(), _identity(device)) if _is_offered(device) else None
    places = gathered(place)
    if None in places or places[0][0] is None or len({host for host, _ in places}) > 1:
        return None
    with contextlib.suppress(Exception):
        joined = _are_joined(device, [identity for _, identity in places])
    if not all(gathered(joined)):
        return None
    with contextlib.suppress(Exception):
        count = largest(far.size)
        made = _Shared({d: _empty(count // d.itemsize, d, device) for d in _DTYPES}, device)
    if not all(gathered(made is not None)) or made is None:
        return None
    for buffer in made.buffers.values():
        met = False
        with contextlib.suppress(Exception):
            _meet(buffer, far.group)
            met = True
        if not all(gathered(met)):
            return None
    end = SymmetricMemory(made, far)
    trials = [(mine, far.all_reduce(mine)) for mine in _trials(made, far.rank)]
    sums = None
    with contextlib.suppress(Exception):
        sums = _tried(end, trials)
    if any(s is None or s != sums for s in gathered(sums)):
        return None
    _shared[far.group.group_name] = made
    return end


def _is_offered(device: torch.device) -> bool:
    """Whether torch has the kernel for such a GPU: below compute capability 8 it ends the process, at bfloat16."""
    try:
        from torch.distributed._symmetric_memory import get_backend
    except ImportError:
        return False
    new_enough = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return new_enough and hasattr(torch.ops.symm_mem, "one_shot_all_reduce_out") and get_backend(device) is not None


def _identity(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _are_joined(device: torch.device, others: Sequence[str]) -> bool:
    """Whether NVLink joins this rank's GPU with each of some others: the kernel's signals are atomics, which GPUs that
    PCIe joins may not have on each other's memory, and then wait for ever."""
    try:
        from torch._C._autograd import DeviceType
        from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]

        links = _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
    except (ImportError, RuntimeError):
        return False
    visible = [_identity(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    mine = _identity(device)
    apart = [other for other in others if other != mine]
    if len(apart) + 1 < len(others) or any(other not in visible for other in apart):  # two ranks on one, or unseen
        return False
    return all(links[visible.index(mine)][visible.index(other)] > 0 for other in apart)


def _empty(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.empty(count, dtype=dtype, device=device)


def _meet(buffer: torch.Tensor, group: dist.ProcessGroup) -> None:
    from torch.distributed import _symmetric_memory

    _symmetric_memory.rendezvous(buffer, group)


def _trials(shared: _Shared, rank: int) -> Iterator[torch.Tensor]:
    """What to add up on trial, as much as the kernel takes and as little: whole numbers, whose sum is exact."""
    for dtype, buffer in shared.buffers.items():
        for count in (buffer.numel(), _ALIGNMENT // dtype.itemsize):
            yield ((torch.arange(count, device=buffer.device) % 4 + 1) * (rank + 1)).to(dtype)


def _tried(end: SymmetricMemory, trials: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, ...] | None:
    """Checksums of the sums of what is tried; None if one is not what it should be."""
    if not all(end.takes(mine) for mine, _ in trials):
        return None
    totals = [end.all_reduce(mine) for mine, _ in trials]  # all of them before any is judged: no rank may stay away
    right = all(torch.equal(total, wanted) for total, (_, wanted) in zip(totals, trials, strict=True))
    return tuple(map(checksum, totals)) if right else None
