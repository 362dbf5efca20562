"""Work done on real processes that add up by a stand-in for the kernel of GPUs' symmetric memory."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from autotp import Tally
from autotp.distributed import symmetric_memory
from autotp.distributed.communicators import ProcessCommunicator
from tests.distributed.ranks import difference


class _Kernel:
    """A stand-in on the CPU for the one-shot kernel, which checks what that takes for granted.

    Args:
        group: the ranks.
        rank: this one.

    Attributes:
        calls: how often it has run.
        off: added to every sum of this rank's.
        error: raised instead.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self.calls, self.group, self.rank, self.off = 0, group, rank, 0.0
        self.error: Exception | None = None
        self.library = torch.library.Library("symm_mem", "IMPL")
        self.library.impl("one_shot_all_reduce_out", self, "CPU")

    def let_go(self) -> None:
        """Gloo's threads do not survive a group that is held until Python ends."""
        self.library._destroy()
        del self.group

    def __call__(self, mine: torch.Tensor, kind: str, group: str, out: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert (kind, group) == ("sum", self.group.group_name)
        assert mine.dtype in (torch.float32, torch.bfloat16)
        assert mine.dtype == out.dtype
        assert mine.shape == out.shape
        assert mine.storage_offset() == 0
        assert mine.data_ptr() in {b.data_ptr() for b in BUFFERS}
        for each in (mine, out):
            assert each.is_contiguous()
            assert each.data_ptr() % 16 == 0
        assert mine.numel() * mine.element_size() % 16 == 0
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, mine, group=self.group)
        if self.error is not None:
            raise self.error
        return out.copy_(sum(every[1:], start=every[0]) + self.off)


BUFFERS: list[torch.Tensor] = []


def _allocated(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    BUFFERS.append(torch.zeros(count, dtype=dtype, device=device))
    return BUFFERS[-1]


def _alike(x: torch.Tensor) -> torch.Tensor:
    """A copy that lies as a tensor does: with gaps, or where the kernel cannot write."""
    if x.data_ptr() % 16:
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].copy_(x)
    return x.detach().clone(memory_format=torch.preserve_format)


def symmetric(rank: int, world: int) -> dict[str, Any]:
    """Sums by a stand-in for the kernel of symmetric memory, and through gloo; then where it is not as it should be."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    assert group is not None
    far = ProcessCommunicator(group, rank, world, lambda e: e)
    cpu, kernel = torch.device("cpu"), _Kernel(group, rank)
    as_offered: dict[str, Any] = {
        "host": lambda: ("here",), "_is_offered": lambda device: True, "_identity": lambda device: f"gpu {rank}",
        "_are_joined": lambda device, others: others == ["gpu 0", "gpu 1"], "_empty": _allocated,
        "_rendezvous": lambda buffer, of: None,
    }  # fmt: skip

    def joined(**other: Any) -> symmetric_memory.SymmetricMemory | None:
        """The end of a group where it is offered, but for what is said to be otherwise."""
        symmetric_memory._shared.clear()
        with contextlib.ExitStack() as stack:
            for name, value in (as_offered | other).items():
                stack.enter_context(mock.patch.object(symmetric_memory, name, value))
            return symmetric_memory.join_symmetric_memory(far, cpu)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not between these")

    near = joined()
    assert near is not None
    found: dict[str, Any] = {"buffers": [(b.dtype, b.numel()) for b in BUFFERS], "worst": 0.0, "same bits": True}
    found |= {"by kernel": [], "in place": []}
    again = symmetric_memory.join_symmetric_memory(far, cpu)
    found["again"] = again is not None and again._shared is near._shared
    generator = torch.Generator().manual_seed(rank)
    flat = torch.rand(symmetric_memory.largest(world) // 4 + 4, generator=generator)
    cases = {
        "small": flat[:4].clone(), "matrix": flat[:24].view(2, 3, 4).clone(), "turned": flat[:24].view(6, 4).t(),
        "not aligned": flat[1:9], "largest": flat[:-4].clone(), "bfloat16": flat[:40].bfloat16(),
        "too large": flat.clone(), "odd": flat[:7].clone(), "empty": flat[:0].clone(), "double": flat[:8].double(),
        "needs a gradient": flat[:8].clone().requires_grad_(),
    }  # fmt: skip
    for name, x in cases.items():
        wanted, before = far.all_reduce(x.detach()), kernel.calls
        kept = x.detach().clone()
        total = near.all_reduce(x)
        assert torch.equal(kept, x.detach()), f"all_reduce changed its argument: {name}"
        given, begun = _alike(x), _alike(x)
        in_place, started = near.all_reduce_(given), near.start_all_reduce(begun)()
        if given.numel() and in_place.data_ptr() == given.data_ptr() and started.data_ptr() == begun.data_ptr():
            found["in place"].append(name)
        if kernel.calls - before == 3:
            found["by kernel"].append(name)
        for each in (total, in_place, started):
            found["worst"] = max(found["worst"], difference(each.detach(), wanted))
            every = near.all_gather(each.detach().contiguous(), [x.shape] * world)
            found["same bits"] = found["same bits"] and all(torch.equal(e, each) for e in every) and len(every) == world
    with Tally() as tally:
        near.all_reduce(cases["small"])
        near.all_reduce(cases["odd"])
    found["tally"] = dict(tally.calls)
    kernel.off = 0.5 * rank
    found["wrong on one rank"] = joined()
    kernel.off, kernel.error = 0.0, RuntimeError("no kernel for this")
    found["an error on all"] = joined()
    kernel.error = None
    by_rank = ("not offered", "another host", "not joined", "takes nothing")
    one: dict[str, dict[str, Any]] = {
        "not offered": {"_is_offered": lambda device: not rank}, "unknown": {"_identity": fails},
        "another host": {"host": lambda: (f"host {rank}",)}, "not joined": {"_are_joined": lambda *_: not rank},
        "no memory": {"_empty": fails}, "does not meet": {"_rendezvous": fails}, "takes nothing": {"_ALIGNMENT": 48},
    }  # fmt: skip
    for name, other in one.items():
        found[name] = joined(**other if rank or name in by_rank else {})
    found["checksums differ"] = joined(checksum=lambda x: rank)
    found["works again"] = joined() is not None
    kernel.let_go()
    return found
