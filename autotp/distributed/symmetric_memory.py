"""symmetric_memory: small all-reduces between GPUs that NVLink joins, in one kernel.

The time of NCCL's all-reduce of some KiB is latency: several steps between the ranks, one after another. torch's
symmetric memory has a kernel that takes one step (``torch.ops.symm_mem.one_shot_all_reduce_out``, of
:mod:`torch.distributed._symmetric_memory`). Each rank's values lie where all others can read them. Once all ranks have
come, each adds the values up in rank order, so that all get the same bits. Each rank reads all values of every rank, so
NCCL's ring is faster from some size on. The kernel does not need the host: a CUDA graph can hold it.

Dtype and size alone decide between the kernel and the process group, and both are the same on all ranks. The kernel
waits for the other ranks without a time limit. So it is used only if checks beforehand say that it works
(:func:`_is_offered`, :func:`_are_joined`), and a trial confirms it. A rank that dies within a call leaves the others
waiting in it, on their GPUs, until whoever started the processes ends them.
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
"""The dtypes that the kernel adds up."""
_ALIGNMENT = 16
"""Bytes that the kernel loads at once. It accepts smaller alignments, too, but all ranks must choose the same way, and
addresses differ between them."""


def largest(size: int) -> int:
    """The largest size in bytes for which the kernel is used between ``size`` ranks; 0: it is not used.

    The limits are those of vLLM's kernel of the same kind, for GPUs that NVLink joins (csrc/custom_all_reduce.cuh).
    Every rank reads the values of all others, so the limits fall with the number of ranks.

    >>> largest(2), largest(8), largest(16)
    (524288, 262144, 0)
    """
    return 0 if size > 8 else (1 << 19 if size <= 4 else 1 << 18)


@dataclass
class _Shared:
    """The memory that a group shares.

    Attributes:
        buffers: per dtype the memory in which the others read this rank's values.
        device: this rank's GPU.
        stream: the last stream that used the memory; the kernel's own signals serve only one stream at a time.
    """

    buffers: dict[torch.dtype, torch.Tensor]
    device: torch.device
    stream: Any = None


_shared: dict[str, _Shared] = {}
"""The shared memory by group name. It stays as long as the process lives: mapped memory must not become another
tensor's."""


class SymmetricMemory:
    """One rank's end of a group of GPUs: small sums in one kernel, all else through the process group.

    Args:
        shared: the group's shared memory.
        fallback: this rank's end of the process group.
    """

    def __init__(self, shared: _Shared, fallback: Any) -> None:
        self._shared, self._fallback, self._name = shared, fallback, fallback.group.group_name
        self.rank, self.size, self.by_host = fallback.rank, fallback.size, fallback.by_host

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether the kernel adds up such a tensor; the answer is the same on all ranks."""
        buffer = self._shared.buffers.get(tensor.dtype)
        if buffer is None or tensor.device != self._shared.device or not 0 < tensor.numel() <= buffer.numel():
            return False
        return tensor.numel() * tensor.element_size() % _ALIGNMENT == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, all of one shape."""
        if not self.takes(tensor):
            return self._fallback.all_reduce(tensor)
        return self._sum(tensor, tensor.new_empty(tensor.shape))

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same sum, in the memory of ``tensor`` if that is contiguous and aligned as the kernel needs."""
        if not self.takes(tensor):
            return self._fallback.all_reduce_(tensor)
        fits = tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0
        return self._sum(tensor, tensor if fits else tensor.new_empty(tensor.shape))

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin :meth:`all_reduce_`, and return a function that waits for the sum and returns it."""
        if not self.takes(tensor):
            return self._fallback.start_all_reduce(tensor)
        total = self.all_reduce_(tensor)
        return lambda: total

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The ranks' tensors in rank order; ``shapes`` gives the shape of each."""
        return self._fallback.all_gather(tensor, shapes)

    def _sum(self, tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        operand = self._shared.buffers[tensor.dtype][: tensor.numel()].view(tensor.shape)
        with self._in_turn():
            operand.copy_(tensor.detach())  # not by the kernel: its warps would not wait for one another
            torch.ops.symm_mem.one_shot_all_reduce_out(operand, "sum", self._name, out.detach())
        return out

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Run on the GPU, after the sums that another stream has begun there."""
        device = self._shared.device
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            last = self._shared.stream
            if last is not None and last != stream and not torch.cuda.is_current_stream_capturing():
                stream.wait_stream(last)
            self._shared.stream = stream
            yield


def join_symmetric_memory(fallback: Any, device: torch.device) -> SymmetricMemory | None:
    """Share memory with the other ranks of a group of GPUs; None on all ranks if one cannot. Collective.

    Args:
        fallback: this rank's end of the process group.
        device: this rank's GPU.
    """

    def gathered(value: Any) -> list[Any]:
        values: list[Any] = [None] * fallback.size
        dist.all_gather_object(values, value, group=fallback.group)
        return values

    if not largest(fallback.size):
        return None
    if (known := _shared.get(fallback.group.group_name)) is not None:
        return SymmetricMemory(known, fallback)
    # All ranks learn how each step went: none may wait for a rank that has failed. torch has no class for these errors.
    gpu, joined, shared = None, False, None
    with contextlib.suppress(Exception):
        gpu = (host(), _identity(device)) if _is_offered(device) else None
    gpus = gathered(gpu)
    if None in gpus or gpus[0][0] is None or len({host for host, _ in gpus}) > 1:
        return None
    with contextlib.suppress(Exception):
        joined = _are_joined(device, [identity for _, identity in gpus])
    if not all(gathered(joined)):
        return None
    with contextlib.suppress(Exception):
        count = largest(fallback.size)
        shared = _Shared({d: _empty(count // d.itemsize, d, device) for d in _DTYPES}, device)
    if not all(gathered(shared is not None)) or shared is None:
        return None
    for buffer in shared.buffers.values():
        mapped = False
        with contextlib.suppress(Exception):
            _rendezvous(buffer, fallback.group)
            mapped = True
        if not all(gathered(mapped)):
            return None
    end = SymmetricMemory(shared, fallback)
    trials = [(operand, fallback.all_reduce(operand)) for operand in _trial_operands(shared, fallback.rank)]
    sums = None
    with contextlib.suppress(Exception):
        sums = _trial_sums(end, trials)
    if any(s is None or s != sums for s in gathered(sums)):
        return None
    _shared[fallback.group.group_name] = shared
    return end


def _is_offered(device: torch.device) -> bool:
    """Whether torch has the kernel for a GPU; below compute capability 8 the kernel ends the process at bfloat16."""
    try:
        from torch.distributed._symmetric_memory import get_backend
    except ImportError:
        return False
    new_enough = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return new_enough and hasattr(torch.ops.symm_mem, "one_shot_all_reduce_out") and get_backend(device) is not None


def _identity(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _are_joined(device: torch.device, others: Sequence[str]) -> bool:
    """Whether NVLink joins this rank's GPU with each of the others.

    The kernel's signals are atomics. GPUs that only PCIe joins may lack atomics on each other's memory, and would then
    wait for ever.
    """
    try:
        from torch._C._autograd import DeviceType
        from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]

        links = _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
    except (ImportError, RuntimeError):
        return False
    visible = [_identity(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    own = _identity(device)
    peers = [other for other in others if other != own]
    if len(peers) + 1 < len(others) or any(peer not in visible for peer in peers):  # two ranks on one GPU, or unseen
        return False
    return all(links[visible.index(own)][visible.index(peer)] > 0 for peer in peers)


def _empty(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.empty(count, dtype=dtype, device=device)


def _rendezvous(buffer: torch.Tensor, group: dist.ProcessGroup) -> None:
    from torch.distributed import _symmetric_memory

    _symmetric_memory.rendezvous(buffer, group)


def _trial_operands(shared: _Shared, rank: int) -> Iterator[torch.Tensor]:
    """Tensors to add up on trial, of the largest and smallest size for the kernel; integers, so that sums are exact."""
    for dtype, buffer in shared.buffers.items():
        for count in (buffer.numel(), _ALIGNMENT // dtype.itemsize):
            yield ((torch.arange(count, device=buffer.device) % 4 + 1) * (rank + 1)).to(dtype)


def _trial_sums(end: SymmetricMemory, trials: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, ...] | None:
    """Checksums of the kernel's sums of some operands; None if one is not as expected.

    Args:
        end: this rank's end.
        trials: operands with their expected sums.
    """
    if not all(end.takes(operand) for operand, _ in trials):
        return None
    totals = [end.all_reduce(operand) for operand, _ in trials]  # all before any is compared: no rank may stay away
    correct = all(torch.equal(total, expected) for total, (_, expected) in zip(totals, trials, strict=True))
    return tuple(map(checksum, totals)) if correct else None
