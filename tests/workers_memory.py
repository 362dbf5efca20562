"""Work done on real processes that exchange through memory, that of the host or a stand-in for that of GPUs."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as memory

from autotp import Tally
from autotp.process import Mesh, ProcessCommunicator, ProcessFabric
from autotp.shared_memory import SharedMemory
from autotp.symmetric_memory import join_symmetric_memory, largest

SHAPES = [(), (1,), (3, 5), (0, 4), (2, 1, 7), (700, 1001), (1 << 18,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]


def exchanges(rank: int, world: int) -> dict[str, Any]:
    """Sums and gathers of many shapes, through memory and through gloo; then ranks that do not fit together."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = Mesh(rank, world, dist.group.WORLD)
    near = ProcessFabric(mesh, 0, lambda e: e).group("tp")
    far = ProcessFabric(mesh, 0, lambda e: e, shared_memory=False).group("tp")
    assert isinstance(near, SharedMemory)
    assert isinstance(far, ProcessCommunicator)
    worst, same, count = 0.0, True, 0
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        for shape in SHAPES:
            for dtype in DTYPES:
                x = (torch.rand(shape, generator=generator) * 100).to(dtype)
                x = x.transpose(0, -1) if x.dim() > 1 else x
                before = near.board.number
                total, wanted = near.all_reduce(x), far.all_reduce(x)
                count += near.board.number - before
                worst = max(worst, _apart(total, wanted))
                every = far.all_gather(total.contiguous(), [x.shape] * world)
                same = same and all(torch.equal(e, total) for e in every)
        counts = [(r + 1, 3) for r in range(world)]
        mine = torch.full(counts[rank], float(rank))
        for one, other in zip(near.all_gather(mine, counts), far.all_gather(mine, counts), strict=True):
            same = same and torch.equal(one, other)
    found: dict[str, Any] = {"through memory": count, "worst": worst, "same bits": same}
    found["different"] = _said(lambda: near.all_reduce(torch.ones(2 + (rank == 0))))
    dist.barrier()
    slow = ProcessFabric(mesh, 0, lambda e: e, timeout=timedelta(seconds=1)).group("tp")
    if rank < world - 1:
        found["late"] = _said(lambda: slow.all_reduce(torch.ones(3)))
    dist.barrier()
    found["after"] = _said(lambda: slow.all_reduce(torch.ones(3)))
    dist.barrier()
    return found


def ends(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 is gone before the exchange; rank 0 waits for it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = ProcessFabric(Mesh(rank, world, dist.group.WORLD), 0, lambda e: e).group("tp")
    group.all_reduce(torch.ones(2))
    if rank:
        return {}
    start = time.monotonic()
    return {"said": _said(lambda: group.all_reduce(torch.ones(2))), "seconds": time.monotonic() - start}


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    if not one.numel():
        return 0.0
    assert one.double().isfinite().all()
    wide = other.double()
    rounding = 2e4 if one.dtype is torch.bfloat16 else 1.0  # gloo may add up in another order
    return float((one.double() - wide).abs().max() / wide.abs().max() / rounding)


def _said(work: Any) -> str:
    try:
        work()
    except RuntimeError as error:
        return str(error)
    return "nothing"


class _Kernel:
    """A stand-in on the CPU for the one-shot kernel, as strict about its arguments as that is."""

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self.calls, self.group, self.rank, self.wrong = 0, group, rank, False
        self.library = torch.library.Library("symm_mem", "IMPL")
        self.library.impl("one_shot_all_reduce_copy_out", self, "CPU")

    def let_go(self) -> None:
        """Gloo's threads do not survive a group that is held until Python ends."""
        self.library._destroy()
        del self.group

    def __call__(
        self, shared: torch.Tensor, mine: torch.Tensor, kind: str, group: str, out: torch.Tensor
    ) -> torch.Tensor:
        self.calls += 1
        assert (kind, group) == ("sum", self.group.group_name)
        assert shared.dtype in (torch.float32, torch.bfloat16)
        assert shared.dtype == mine.dtype == out.dtype
        assert shared.shape == mine.shape == out.shape
        for each in (shared, mine, out):
            assert each.is_contiguous()
            assert each.data_ptr() % 16 == 0
        assert mine.numel() * mine.element_size() % 16 == 0
        shared.copy_(mine)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, shared, group=self.group)
        total = every[0] if self.wrong and self.rank else sum(every[1:], start=every[0])
        return out.copy_(total)


def symmetric(rank: int, world: int) -> dict[str, Any]:
    """Sums by a stand-in for the kernel of symmetric memory, and through gloo; then where it is not as it should be."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    assert group is not None
    far = ProcessCommunicator(group, rank, world, lambda e: e)
    cpu, met = torch.device("cpu"), list[tuple[torch.dtype, int]]()
    memory.empty = lambda count, dtype, device: torch.zeros(count, dtype=dtype, device=device)  # type: ignore[assignment]
    memory.rendezvous = lambda buffer, _: met.append((buffer.dtype, buffer.numel()))  # type: ignore[assignment,return-value,func-returns-value]
    memory.get_backend = lambda device: "CUDA"
    kernel = _Kernel(group, rank)
    near = join_symmetric_memory(far, cpu)
    assert near is not None
    found: dict[str, Any] = {"buffers": list(met), "worst": 0.0, "same bits": True, "by kernel": []}
    generator = torch.Generator().manual_seed(rank)
    flat = torch.rand(largest(world) // 4 + 4, generator=generator)
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
        given = x.detach().clone()
        in_place = near.all_reduce_(given)
        assert in_place.data_ptr() == given.data_ptr() or not given.is_contiguous()
        started = near.start_all_reduce(x.detach().clone())()
        if kernel.calls - before == 3:
            found["by kernel"].append(name)
        for each in (total, in_place, started):
            found["worst"] = max(found["worst"], _apart(each.detach(), wanted))
            every = far.all_gather(each.detach().contiguous(), [x.shape] * world)
            found["same bits"] = found["same bits"] and all(torch.equal(e, each) for e in every)
    with Tally() as tally:
        near.all_reduce(cases["small"])
        near.all_reduce(cases["odd"])
    found["tally"] = dict(tally.calls)
    kernel.wrong = True
    found["wrong"] = join_symmetric_memory(far, cpu)
    kernel.wrong = False

    def refuse(buffer: torch.Tensor, _: Any) -> None:
        if rank:
            raise RuntimeError("no access to the peer's memory")

    memory.rendezvous = refuse  # type: ignore[assignment]
    found["refused on one rank"] = join_symmetric_memory(far, cpu)
    memory.get_backend = lambda device: None if rank else "CUDA"
    found["not offered on one rank"] = join_symmetric_memory(far, cpu)
    kernel.let_go()
    return found
