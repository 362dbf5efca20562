"""Work on real processes: exchanges through memory, agreement, groups, random numbers."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.distributed.communicators import ProcessCommunicator
from autotp.distributed.mesh import Mesh
from autotp.distributed.process_context import ProcessContext
from autotp.distributed.shared_memory import SharedMemory
from autotp.options import Options
from autotp.verification.measure import relative_error
from passes import ops
from passes.ops.context import use_context
from tests.comparison import apart, backward, gradients_apart, outputs, raised, same, scaled
from tests.models import IDS, MLP, Grouped, Scaled, SmallGPT, TutorialAttention, small_gpt

Result = dict[str, Any]
SHAPES = [(), (1,), (3, 5), (0, 4), (2, 1, 7), (700, 1001), (1 << 18,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]


def exchanges(rank: int, world: int) -> dict[str, Any]:
    """Sums and gathers of many shapes, through memory and through gloo; then ranks that do not fit together."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = Mesh(rank, world, dist.group.WORLD)
    near = ProcessContext(mesh, 0, lambda e: e).group("tp")
    far = ProcessContext(mesh, 0, lambda e: e, Options(shared_memory=False)).group("tp")
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
                worst = max(worst, difference(total, wanted))
                every = far.all_gather(total.contiguous(), [x.shape] * world)
                same = same and all(torch.equal(e, total) for e in every)
        counts = [(r + 1, 3) for r in range(world)]
        mine = torch.full(counts[rank], float(rank))
        for one, other in zip(near.all_gather(mine, counts), far.all_gather(mine, counts), strict=True):
            same = same and torch.equal(one, other)
    found: dict[str, Any] = {"through memory": count, "worst": worst, "same bits": same}
    found["different"] = _said(lambda: near.all_reduce(torch.ones(2 + (rank == 0))))
    dist.barrier()
    slow = ProcessContext(mesh, 0, lambda e: e, Options(timeout=timedelta(seconds=1))).group("tp")
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


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
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


def replicas(rank: int, world: int) -> Result:
    """Models one after another of which two of three ranks hold one head: a group that the third is not in."""
    result: Result = {}
    for number in range(3):
        dense, model = Grouped(2).double(), Grouped(2).double()
        autotp.parallelize(model, world, example_inputs=(IDS,), timeout=timedelta(seconds=30))
        result[f"{number}: outputs"] = apart(dense, model, ids=IDS)
        backward(outputs(dense(IDS)))
        backward(outputs(model(IDS)))
        result[f"{number}: gradients"] = gradients_apart(dense, model)
        result[f"{number}: groups"] = sorted(g.size for g in model.__dict__["_autotp"].context._groups.values())
    return result


def disagreements(found: Result, rank: int) -> None:
    """Ranks that call parallelize with something different: no group exists yet, and each leaves them able to go on."""
    found["different tp"] = raised(lambda: autotp.parallelize(small_gpt(), 1 + rank))
    found["different models"] = raised(
        lambda: autotp.parallelize(small_gpt() if rank == 0 else SmallGPT(hidden=32, vocabulary=301).double(), 2)
    )
    inputs = {"ids": torch.zeros(2, 16 if rank == 0 else 8, dtype=torch.long)}
    found["different inputs"] = raised(lambda: autotp.parallelize(small_gpt(), 2, example_inputs=inputs))
    ids = torch.zeros(2, 8, dtype=torch.long)
    keyword = {"ids": ids} if rank == 0 else {"ids": ids, "targets": ids}
    found["different structure"] = raised(lambda: autotp.parallelize(small_gpt(), 2, example_inputs=keyword))
    found["strict on one"] = raised(lambda: autotp.parallelize(small_gpt(), 2, strict=rank == 0))

    class Broken(SmallGPT):
        def forward(self, ids: torch.Tensor, targets: Any = None) -> Any:
            if rank == 1:
                raise ZeroDivisionError("only here")
            return super().forward(ids, targets)

    Broken.__qualname__ = "SmallGPT"
    found["one rank fails"] = raised(lambda: autotp.parallelize(Broken(hidden=32), 2, example_inputs=(ids,)))


def agreement(rank: int, world: int) -> Result:
    """Ranks that differ where they parallelize, and then ranks that do not come."""
    found: Result = {}
    disagreements(found, rank)

    # Last, for these break process groups: each has its own.
    odd = rank == world - 1
    for name in ("fewer calls", "no backward"):
        group = dist.new_group(timeout=timedelta(seconds=4))
        model, x = scaled(world, mesh=group, timeout=timedelta(seconds=4))[1:]
        y = model(x)
        dist.barrier()
        if name == "fewer calls":
            found[name] = "stayed away" if odd else raised(lambda: model(x))  # noqa: B023
        else:
            x.requires_grad_()
            y = model(x)
            found[name] = raised(lambda: model(x)) if odd else raised(lambda: y.sum().backward())  # noqa: B023
        dist.monitored_barrier(timeout=timedelta(seconds=30))
    return found


def random_state(rank: int, world: int) -> Result:
    """Dropout on ranks whose seeds differ: modes and dtypes, and 20 steps of training."""
    found: Result = {}

    # Modes and dtypes: dropout draws the same on whole values although seeds differ.
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = TutorialAttention(64, 4), MLP(64, 128)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.drop(self.first(x))
            return self.second(self.drop(x))

    torch.manual_seed(0)
    dropping = autotp.parallelize(Dropping().double(), 2)
    x = torch.ones(3, 7, 64, dtype=torch.float64)
    y = dropping(x)
    every = [torch.empty_like(y) for _ in range(2)]
    dist.all_gather(every, y.detach())
    found["dropout agrees"] = torch.equal(every[0], every[1])
    found["dropout drops"] = not torch.equal(y, dropping(x))
    dropping.eval()
    found["eval is steady"] = torch.equal(dropping(x), dropping(x))
    dropping.to(torch.bfloat16)
    low = dropping(x.to(torch.bfloat16))
    found["bfloat16"] = low.dtype is torch.bfloat16
    found["bfloat16 close"] = relative_error(dropping.double()(x), low.double())

    x = torch.linspace(-1, 1, 3 * 5 * 64, dtype=torch.float64).view(3, 5, 64).sin()
    torch.manual_seed(100 + rank)
    model = Scaled().double()
    with torch.inference_mode():
        autotp.parallelize(model, world, example_inputs=(x,))
        model(x.clone(), flag=True)
    model(x, flag=True).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    runtime, whole, drops = model.__dict__["_autotp"], [], []
    for i in range(20):
        found["dropping"] = model.training
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1 * (i + 1))
        optimizer.step()
        whole.append(same(y))
        drops.append(float(y.detach().sum()))
    found["outputs agree"] = all(whole) and len(set(drops)) == 20
    found["whole parameters agree"] = all(same(p.data) for _, p, shards in runtime.placed() if not shards)
    found["shards differ"] = not same(model.second[0].weight.data)
    with use_context(runtime.context):
        own = ops.random_per_rank(torch.nn.functional.dropout, torch.ones(1000), 0.5)
        shared = ops.random_same(torch.nn.functional.dropout, torch.ones(1000), 0.5)
    found["own"], found["shared"] = same(own), same(shared)
    return found
