"""symmetric_memory: small sums between GPUs that reach each other's memory, in one kernel.

NCCL's all-reduce of some KiB is latency: several steps between the ranks, one after another. torch's symmetric memory
has a kernel that does it in one: each rank copies its values to where all others can read them, waits until all
have, and adds up what it reads, in rank order, so that all get the same bits
(``torch.ops.symm_mem.one_shot_all_reduce_copy_out``, of :mod:`torch.distributed._symmetric_memory`). It reads every
rank's values whole, so from some size on the ring of NCCL is faster. It runs on the current stream and asks nothing
of the host: a CUDA graph can hold it.

What goes which way depends on dtype and size alone, which the ranks have in common. Before it is used, sums of both
kinds are compared on all ranks: where torch does not offer it between these GPUs, or it is not right, NCCL does all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from autotp.digests import checksum

__all__ = ["SymmetricMemory", "join_symmetric_memory", "largest"]

_DTYPES = (torch.float32, torch.bfloat16)
"""What the kernel adds."""
_ALIGNMENT = 16
"""Bytes that it loads at once; it takes less, but the ranks must agree, and addresses are a rank's own."""


def largest(size: int) -> int:
    """The bytes up to which the kernel is used between so many ranks; 0: not at all.

    The limits are those of vLLM's kernel of the same kind (csrc/custom_all_reduce.cuh): every rank reads what all
    others have, so they fall with the ranks.

    >>> largest(2), largest(8), largest(16)
    (524288, 262144, 0)
    """
    return 0 if size > 8 else (1 << 19 if size <= 4 else 1 << 18)


class SymmetricMemory:
    """One rank's end of a group of GPUs: small sums in one kernel, all else through the process group.

    Args:
        buffers: per dtype the memory in which the others read this rank's values, of :func:`largest` bytes.
        far: the process group's end.
    """

    def __init__(self, buffers: dict[torch.dtype, torch.Tensor], far: Any) -> None:
        self.buffers, self._far, self._name = buffers, far, far.group.group_name
        self._device = next(iter(buffers.values())).device
        self.rank, self.size, self.by_host = far.rank, far.size, far.by_host

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether the kernel adds such tensors; the same on all ranks."""
        buffer = self.buffers.get(tensor.dtype)
        if buffer is None or tensor.device != self._device or not 0 < tensor.numel() <= buffer.numel():
            return False
        return tensor.numel() * tensor.element_size() % _ALIGNMENT == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, all of one shape."""
        if not self.takes(tensor):
            return self._far.all_reduce(tensor)
        mine = _aligned(tensor)
        return self._sum(mine, torch.empty_like(mine))

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same, in the memory of ``tensor`` if that has no gaps and lies where the kernel can load it."""
        if not self.takes(tensor):
            return self._far.all_reduce_(tensor)
        mine = _aligned(tensor)
        return self._sum(mine, mine)  # an element is read before it is written, by the same thread

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
        shared = self.buffers[tensor.dtype][: tensor.numel()].view(tensor.shape)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(shared, tensor.detach(), "sum", self._name, out.detach())
        return out


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    mine = tensor.contiguous()
    return mine if mine.data_ptr() % _ALIGNMENT == 0 else mine.clone()


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

    if not largest(far.size) or not all(gathered(_is_offered(device))):
        return None
    buffers = {}
    for dtype in _DTYPES:
        with contextlib.suppress(Exception):  # torch names no class of error for GPUs that do not reach each other
            buffers[dtype] = _shared(far, dtype, device)
        if not all(gathered(dtype in buffers)):
            return None
    made = SymmetricMemory(buffers, far)
    trials = [(mine, far.all_reduce(mine)) for mine in _trials(made)]
    tried = None
    with contextlib.suppress(Exception):
        tried = _tried(made, trials)
    said = gathered(tried)
    return made if tried is not None and all(s == tried for s in said) else None


def _is_offered(device: torch.device) -> bool:
    try:
        import torch.distributed._symmetric_memory as symmetric
    except ImportError:
        return False
    backend = getattr(symmetric, "get_backend", lambda _: "CUDA")
    return hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy_out") and backend(device) is not None


def _shared(far: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(largest(far.size) // dtype.itemsize, dtype=dtype, device=device)
    symmetric.rendezvous(buffer, far.group)
    return buffer


def _trials(made: SymmetricMemory) -> Iterator[torch.Tensor]:
    """What to add up on trial: as much as the kernel takes, and as little."""
    for dtype, buffer in made.buffers.items():
        for count in (buffer.numel(), _ALIGNMENT // dtype.itemsize):
            yield torch.linspace(-1, 1 + made.rank, count, device=buffer.device).to(dtype)


def _tried(made: SymmetricMemory, trials: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, ...] | None:
    """Checksums of the sums of what is tried, which should be these; None if one is wrong."""
    totals = [made.all_reduce(mine) for mine, _ in trials]  # all of them before any is judged: no rank may stay away
    for total, (_, wanted) in zip(totals, trials, strict=True):
        room = made.size * torch.finfo(total.dtype).eps * (1 + made.size) ** 2
        if not torch.allclose(total.float(), wanted.float(), rtol=0, atol=room):
            return None
    return tuple(map(checksum, totals))
