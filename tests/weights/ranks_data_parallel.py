"""Work on real processes: data parallelism around a parallelized model, over right and wrong ranks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import autotp
from autotp.verification.measure import relative_error
from tests.comparison import apart, raised

Result = dict[str, Any]


class Net(nn.Module):
    """Two blocks, of which one does not divide evenly, and a norm, which stays unsplit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(33, 32), nn.LayerNorm(32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, n), nn.GELU(), nn.Linear(n, 32)) for n in (67, 68))
        self.head = nn.Linear(32, 33)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(self.norm(x))
        return self.head(x)


class Outer(nn.Module):
    """A model that contains one that is parallelized."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(33, 5).double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(ids).tanh())


IDS = torch.arange(8 * 7).view(8, 7) * 5 % 33


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def parallel(tp: int, **options: Any) -> nn.Module:
    return autotp.parallelize(net(), tp, example_inputs=(IDS[:4],), **options)


def train(model: nn.Module, x: torch.Tensor, optimizer: Any = None) -> None:
    """Three steps of a mean over the batch, so that the mean over two halves of it is that of the whole."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sin().square().mean().backward()
        optimizer.step()


def _half() -> torch.Tensor:
    """The part of the batch of this rank's copy of the model; there are two copies on four ranks."""
    return IDS[dist.get_rank() // 2 * 4 :][:4]


def _unlike_dense(expected: nn.Module, model: nn.Module) -> float:
    full = autotp.full_state_dict(model)
    return max(relative_error(t, full[n], 1e-3) for n, t in expected.state_dict().items())


def exact(rank: int, world: int) -> Result:
    """Training over the ranks that hold the same shard, beside the dense model on the joint batch."""
    from torch.distributed._composable.replicate_with_fsdp import replicate
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found: Result = {}
    expected = net()
    train(expected, IDS)
    model = parallel(2)  # consecutive ranks are made tensor-parallel
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    group = mesh["dp"].get_group()

    def zero(m: nn.Module) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(m.parameters(), torch.optim.AdamW, process_group=group, lr=1e-2)

    def bucketed(m: nn.Module) -> nn.Module:
        return DistributedDataParallel(m, process_group=group, gradient_as_bucket_view=True)

    for name, wrap, make_optimizer in [
        ("DistributedDataParallel", lambda m: DistributedDataParallel(m, process_group=group), None),
        ("bucket view", bucketed, None),
        ("device mesh", lambda m: DistributedDataParallel(m, device_mesh=mesh["dp"]), None),
        ("ZeroRedundancyOptimizer", lambda m: DistributedDataParallel(m, process_group=group), zero),
        ("fully_shard", lambda m: fully_shard(m, mesh=mesh["dp"]), None),
        ("replicate", lambda m: replicate(m, mesh=mesh["dp"]), None),
        ("control: no wrapper", lambda m: m, None),
    ]:  # fmt: skip
        model = parallel(2)
        wrapped = wrap(model)
        train(wrapped, _half(), make_optimizer(wrapped) if make_optimizer is not None else None)
        found[name] = _unlike_dense(expected, model)
        if name == "fully_shard":
            found["a submodule of it by itself"] = raised(lambda m=model: m.blocks[0](torch.ones(2, 32).double()))

    model = parallel(2, mesh=mesh["tp"])
    train(DistributedDataParallel(model, process_group=group), _half())
    found["tensor-parallel mesh"] = _unlike_dense(expected, model)

    torch.manual_seed(1)
    dense = Outer(net())
    outer = Outer(parallel(2))
    outer.last.load_state_dict(dense.last.state_dict())
    train(dense, IDS)
    train(DistributedDataParallel(outer, process_group=group), _half())
    found["a model around it"] = max(
        _unlike_dense(dense.inner, outer.inner), relative_error(dense.last.weight, outer.last.weight)
    )

    dense, model, x = net(), parallel(2), torch.linspace(-1, 1, 8 * 32, dtype=torch.float64).view(8, 32)
    train(dense.blocks[0], x)
    train(DistributedDataParallel(model.blocks[0], process_group=group), x[rank // 2 * 4 :][:4])
    found["a submodule of it"] = _unlike_dense(dense, model)
    return found


def _unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Whether the model holds the same shards, and computes what the dense one does."""
    same = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    return same and apart(net(), model, ids=IDS) < 1e-12


def _wrong(group: Any, mesh: Any) -> Iterator[tuple[str, Callable[[nn.Module], Any]]]:
    """What keeps parameters equal over the ranks of a group; None: over all."""
    from torch.distributed._composable.replicate import replicate as replicate_by_ddp
    from torch.distributed._composable.replicate_with_fsdp import replicate
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    def averaged(m: nn.Module) -> None:
        sgd = torch.optim.SGD(m.parameters(), lr=0.0)
        m(IDS).sum().backward()
        PostLocalSGDOptimizer(sgd, PeriodicModelAverager(1, process_group=group)).step()

    def reduced(m: nn.Module) -> None:
        m(IDS).sum().backward()
        for p in m.parameters():
            dist.all_reduce(p.grad, group=group)

    hybrid = ShardingStrategy.HYBRID_SHARD
    yield "DistributedDataParallel", lambda m: DistributedDataParallel(m, process_group=group)
    yield "without synchronization", lambda m: DistributedDataParallel(m, init_sync=False, process_group=group)
    yield "a submodule", lambda m: DistributedDataParallel(m.blocks[1], process_group=group)
    yield "a model around it", lambda m: DistributedDataParallel(Outer(m), process_group=group)
    yield "FullyShardedDataParallel", lambda m: FullyShardedDataParallel(m, process_group=group)
    yield "fully_shard", lambda m: fully_shard(m, mesh=mesh)
    yield "fully_shard of a block", lambda m: fully_shard(m.blocks[0], mesh=mesh)
    yield "replicate", lambda m: replicate(m, mesh=mesh)
    yield "ZeroRedundancyOptimizer", lambda m: ZeroRedundancyOptimizer(m.parameters(), torch.optim.SGD, group, lr=0.1)
    yield (
        "parameter groups",
        lambda m: ZeroRedundancyOptimizer(
            [{"params": m.blocks[1].parameters()}], torch.optim.SGD, process_group=group, lr=0.1
        ),
    )
    yield "average_parameters", averaged
    yield "all_reduce", reduced
    yield "broadcast", lambda m: [dist.broadcast(p.data, group_src=0, group=group) for p in m.parameters()]
    if group is None:
        yield "hybrid", lambda m: FullyShardedDataParallel(m, sharding_strategy=hybrid)
        yield "DataParallel", nn.DataParallel
        yield "replicate by DDP", lambda m: replicate_by_ddp(m)(IDS)  # it raises at the call, and stays on the model


def refused(rank: int, world: int) -> Result:
    """Wrappers over ranks that hold different shards."""
    found: Result = {}
    plain = net()
    parallel(2)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    crossed = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])][rank in (1, 2)]
    for where, group, mesh in (("all", None, None), ("tp", pairs["tp"].get_group(), pairs["tp"])):
        model = parallel(2)
        before = {n: p.clone() for n, p in model.named_parameters()}
        for name, wrap in _wrong(group, mesh):
            found[where, name] = raised(lambda: wrap(model))  # noqa: B023
            found[where, name, "unchanged"] = name == "replicate by DDP" or _unchanged(model, before)
    model = parallel(2)
    found["crossed"] = raised(lambda: DistributedDataParallel(model, process_group=crossed))
    found["two models"] = raised(lambda: DistributedDataParallel(nn.ModuleList([plain, model])))
    copied = copy.deepcopy(model)
    found["a copy"] = raised(lambda: DistributedDataParallel(copied))
    whole = parallel(4)
    found["all ranks"] = raised(lambda: DistributedDataParallel(whole))
    found["wrong arguments"] = raised(lambda: DistributedDataParallel(model, no_such_argument=1))

    found["before: DistributedDataParallel"] = _before(DistributedDataParallel)

    from torch.distributed.optim import ZeroRedundancyOptimizer

    found["before: ZeroRedundancyOptimizer"] = _before(
        lambda m: ZeroRedundancyOptimizer(m.parameters(), torch.optim.SGD, lr=0.1)
    )
    DistributedDataParallel(plain)  # garbage
    found["before: garbage"] = raised(lambda: autotp.parallelize(plain, 2, example_inputs=(IDS,)))
    return found


def _before(wrap: Callable[[nn.Module], Any]) -> str:
    """What ``parallelize`` says to a dense model that was wrapped before."""
    model = net()
    wrapped = wrap(model)
    said = raised(lambda: autotp.parallelize(model, 2, example_inputs=(IDS,)))
    return said if apart(net(), model, ids=IDS) == 0 and wrapped is not None else f"changed: {said}"


def allowed(rank: int, world: int) -> Result:
    """What must go on: other models, unsplit parameters, one rank."""
    found: Result = {}
    model = parallel(2)
    own = dist.new_group([rank], use_local_synchronization=True)
    for name, work in {
        "another model": lambda: DistributedDataParallel(net())(IDS),
        "unsplit parameters": lambda: DistributedDataParallel(model.norm),
        "one rank": lambda: DistributedDataParallel(parallel(1, mesh=own))(IDS),
        "a group of one rank": lambda: DistributedDataParallel(model, process_group=own),
        "all_reduce of a norm": lambda: dist.all_reduce(model.blocks[1][0].weight.detach().norm()),
        "all_reduce of a copy": lambda: dist.all_reduce(model.blocks[1][0].weight.detach().clone()),
        "no model": lambda: dist.all_reduce(torch.ones(model.blocks[1][0].weight.numel())),
    }.items():
        found[name] = raised(work)
    return found


def accelerated(rank: int, world: int) -> Result:
    """Accelerate and transformers' Trainer, where all processes are the ranks of one model."""
    import transformers
    from accelerate import Accelerator

    found: Result = {}
    dense, model = net(), parallel(world)
    train(dense, IDS)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found["prepare"] = raised(lambda: accelerator.prepare(model, optimizer))
    prepared, optimizer = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(optimizer)
    train(prepared, IDS, optimizer)
    found["prepared without a wrapper"] = _unlike_dense(dense, model)

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    llama = autotp.parallelize(transformers.LlamaForCausalLM(config), world)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    options: dict[str, Any] = {"use_cpu": True, "max_steps": 1, "report_to": [], "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(folder, disable_tqdm=True, **options)
        found["Trainer"] = raised(lambda: transformers.Trainer(llama, arguments, train_dataset=rows).train())
    return found


def everything(rank: int, world: int) -> Result:
    """All of the above, on the same processes."""
    return {work.__name__: work(rank, world) for work in (exact, refused, allowed, accelerated)}
