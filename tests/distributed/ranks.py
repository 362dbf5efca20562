"""Work done on real processes that exchange through memory."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autotp.distributed.communicators import ProcessCommunicator
from autotp.distributed.mesh import Mesh
from autotp.distributed.process_context import ProcessContext
from autotp.distributed.shared_memory import SharedMemory

SHAPES = [(), (1,), (3, 5), (0, 4), (2, 1, 7), (700, 1001), (1 << 18,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]


def exchanges(rank: int, world: int) -> dict[str, Any]:
    """Sums and gathers of many shapes, through memory and through gloo; then ranks that do not fit together."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = Mesh(rank, world, dist.group.WORLD)
    near = ProcessContext(mesh, 0, lambda e: e).group("tp")
    far = ProcessContext(mesh, 0, lambda e: e, shared_memory=False).group("tp")
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
                worst = max(worst, apart(total, wanted))
                every = far.all_gather(total.contiguous(), [x.shape] * world)
                same = same and all(torch.equal(e, total) for e in every)
        counts = [(r + 1, 3) for r in range(world)]
        mine = torch.full(counts[rank], float(rank))
        for one, other in zip(near.all_gather(mine, counts), far.all_gather(mine, counts), strict=True):
            same = same and torch.equal(one, other)
    found: dict[str, Any] = {"through memory": count, "worst": worst, "same bits": same}
    found["different"] = _said(lambda: near.all_reduce(torch.ones(2 + (rank == 0))))
    dist.barrier()
    slow = ProcessContext(mesh, 0, lambda e: e, timeout=timedelta(seconds=1)).group("tp")
    if rank < world - 1:
        found["late"] = _said(lambda: slow.all_reduce(torch.ones(3)))
    dist.barrier()
    found["after"] = _said(lambda: slow.all_reduce(torch.ones(3)))
    dist.barrier()
    return found


def ends(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 is gone before the exchange; rank 0 waits for it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = ProcessContext(Mesh(rank, world, dist.group.WORLD), 0, lambda e: e).group("tp")
    group.all_reduce(torch.ones(2))
    if rank:
        return {}
    start = time.monotonic()
    return {"said": _said(lambda: group.all_reduce(torch.ones(2))), "seconds": time.monotonic() - start}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two sums, to the largest element."""
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
