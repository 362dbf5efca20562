"""Work on real processes: state dicts that know of their shards, and torch's checkpoints of them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import autotp
from autotp.verification.measure import Float64
from autotp.weights.shard_tensor import ShardTensor, plain
from tests.comparison import raised
from tests.models import make

Result = dict[str, Any]
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}
RUNS = {"llama": "adamw", "gpt2": "momentum", "gpt": "foreach", "neox": "fused"}
"""The models, each with its optimizer: fewer key-value heads than ranks, fused and tied weights, odd sizes."""


def _loss(model: nn.Module, name: str, step: int) -> torch.Tensor:
    ids = torch.randint(0, 1000, (2, 9), generator=torch.Generator().manual_seed(step))
    inputs = {"ids": ids, "targets": ids.roll(1, 1)} if name == "gpt" else {"input_ids": ids, "labels": ids}
    with Float64():
        loss: torch.Tensor = model(**inputs)[0]
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, name: str, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        _loss(model, name, step).backward()
        optimizer.step()


def dense_run(name: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make(name, 1, 9)[0]
    optimizer = OPTIMIZERS[RUNS[name]](model.parameters())
    train(model, optimizer, name, range(steps))
    return model, optimizer


def _parallel(name: str, world: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, inputs = make(name, 1, 9, seed)
    with Float64():
        model = autotp.parallelize(model, world, example_inputs=inputs)
    return model, OPTIMIZERS[RUNS[name]](model.parameters())


def far(dense: nn.Module, model: nn.Module) -> float:
    """The largest difference of a parameter from the dense model's."""
    full = autotp.full_state_dict(model)
    return max(float((p - full[n]).abs().max()) for n, p in dense.state_dict().items())


def resumed(rank: int, world: int, folder: Path, source: int, start: int, steps: int) -> Result:
    """Runs that go on from a checkpoint of another number of ranks, and write one."""
    result: Result = {}
    for name in RUNS:
        model, optimizer = _parallel(name, world, seed=1 if source else 0)
        if source and name in ("llama", "gpt"):  # torch's functions make the optimizer's state first
            state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
            dcp.load(state, checkpoint_id=folder / f"{name}-{source}")
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        elif source:  # the plain state dicts, after a step that makes the optimizer's state
            train(model, optimizer, name, range(1))
            state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
            dcp.load(state, checkpoint_id=folder / f"{name}-{source}")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optim"])
        train(model, optimizer, name, range(start, start + steps))
        if name in ("llama", "gpt"):
            state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        else:
            state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
        dcp.save(state, checkpoint_id=folder / f"{name}-{world}")
        result[name] = far(dense_run(name, start + steps)[0], model)
        plain = [type(x) for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
        result[f"plain state of {name}"] = set(plain) == {torch.Tensor}
        result[f"shards of {name}"] = sum(isinstance(x, ShardTensor) for x in model.state_dict().values())
    return result


def state_apis(rank: int, world: int, folder: Path) -> Result:
    """torch's functions on state dicts, and safetensors', on one model of each kind."""
    result: Result = {}
    full_options = StateDictOptions(full_state_dict=True)
    for name in RUNS:
        model, optimizer = _parallel(name, world)
        train(model, optimizer, name, range(2))
        dense, dense_optimizer = dense_run(name, 2)
        full = get_model_state_dict(model, options=full_options)
        result[f"{name}: full model"] = _far_dicts(dense.state_dict(), full)
        offloaded = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        result[f"{name}: offloaded"] = (len(offloaded) > 0) == (rank == 0)
        expected = get_optimizer_state_dict(dense, dense_optimizer)
        states = get_optimizer_state_dict(model, optimizer, options=full_options)
        result[f"{name}: full optimizer"] = _far_states(expected, states)
        other, other_optimizer = _parallel(name, world, seed=1)
        set_model_state_dict(other, full, options=full_options)
        set_optimizer_state_dict(  # torch's loads without a copy
            other, other_optimizer, copy.deepcopy(states), options=full_options
        )
        train(other, other_optimizer, name, range(2, 4))
        goal = dense_run(name, 4)[0]
        result[f"{name}: set full"] = far(goal, other)
        other, other_optimizer = _parallel(name, world, seed=1)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(other, full if rank == 0 else {}, options=options)
        set_optimizer_state_dict(other, other_optimizer, states if rank == 0 else {}, options=options)
        train(other, other_optimizer, name, range(2, 4))
        result[f"{name}: set broadcast"] = far(goal, other)
        only = autotp.full_state_dict(model, rank=1, device="cpu")
        result[f"{name}: on one rank"] = _far_dicts(dense.state_dict(), only) if rank == 1 else float(len(only))
    return result


def _far_dicts(dense: dict[str, Any], full: dict[str, Any]) -> float:
    if list(dense) != list(full) or any(type(x) is not torch.Tensor for x in full.values()):
        return float("inf")
    return max(float((x - full[n]).abs().max()) if x.shape == full[n].shape else float("inf") for n, x in dense.items())


def _far_states(dense: Any, full: Any) -> float:
    return max(
        float((x - full["state"][n][key]).abs().max()) if x.shape == full["state"][n][key].shape else float("inf")
        for n, values in dense["state"].items()
        for key, x in values.items()
        if isinstance(x, torch.Tensor)
    )


def marks(rank: int, world: int, folder: Path) -> Result:
    """What a local state dict knows, and what refuses it."""
    model, optimizer = _parallel("llama", world)
    train(model, optimizer, "llama", range(1))
    state = model.state_dict()
    name = next(n for n, x in state.items() if isinstance(x, ShardTensor))
    shard = state[name]
    before = {n: x.clone() for n, x in state.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.save(state, folder / f"marks-{rank}.pt")
        torch.save(optimizer.state_dict(), folder / f"optim-{rank}.pt")
    dist.barrier()
    own = torch.load(folder / f"marks-{rank}.pt")
    others = torch.load(folder / f"marks-{(rank + 1) % world}.pt")
    result: Result = {
        "warnings": [f"{w.category.__name__}: {w.message}" for w in caught],
        "memory": shard.data_ptr() == model.get_parameter(name).data_ptr(),
        "shape": tuple(shard.shape) == tuple(model.get_parameter(name).shape),
        "plain results": {type(x) for x in (shard + 1, shard[0], shard.sum(), shard.float(), shard * shard)},
        "copies": {type(x) for x in (shard.clone(), shard.cpu(), shard.to(torch.float32), copy.deepcopy(shard))},
        "loaded own": str(model.load_state_dict(own)),
        "loaded other's": raised(lambda: model.load_state_dict(others)),
        "loaded other's optimizer": raised(
            lambda: optimizer.load_state_dict(torch.load(folder / f"optim-{(rank + 1) % world}.pt"))
        ),
        "save_file": raised(lambda: save_file(model.state_dict(), folder / "refused.safetensors")),
        "copies in save_file": raised(
            lambda: save_file({n: x.cpu().contiguous() for n, x in state.items()}, folder / "refused.safetensors")
        ),
        "save_model": raised(lambda: save_model(model, str(folder / "refused.safetensors"))),
        "parameters in save_file": raised(
            lambda: save_file({"w": model.get_parameter(name).data}, folder / "refused.safetensors")
        ),
        "nothing written": not (folder / "refused.safetensors").exists(),
        "as before": all(torch.equal(x, before[n]) for n, x in model.state_dict().items()),
    }
    optimizer.load_state_dict(torch.load(folder / f"optim-{rank}.pt"))
    train(model, optimizer, "llama", range(1, 3))
    result["after loading"] = far(dense_run("llama", 3)[0], model)
    unsplit = {n: x for n, x in model.state_dict().items() if not isinstance(x, ShardTensor)}
    if rank == 0:
        save_file({n: x.contiguous() for n, x in unsplit.items()}, folder / "unsplit.safetensors")
        result["unsplit"] = set(load_file(folder / "unsplit.safetensors")) == set(unsplit)
    inner = model.model.state_dict()
    result["inner"] = isinstance(inner[name.removeprefix("model.")], ShardTensor)
    outer = nn.ModuleDict({"m": model}).state_dict()
    result["outer"] = isinstance(outer[f"m.{name}"], ShardTensor)
    result["another tp"] = raised(
        lambda: nn.ModuleDict({"m": _solo()}).load_state_dict({"m." + n: x for n, x in own.items()})
    )
    return result


def on_two_axes(rank: int, world: int, folder: Path) -> Result:
    """Checkpoints, also asynchronous ones, of two tensor-parallel ranks times two data-parallel ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, inputs = make("llama", 1, 9)
    with Float64():
        model = autotp.parallelize(model, 2, example_inputs=inputs, mesh=mesh["tp"])
        outer = nn.parallel.DistributedDataParallel(model, process_group=mesh["dp"].get_group())
        optimizer = OPTIMIZERS["adamw"](outer.parameters())
        train(outer, optimizer, "llama", range(2))
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "wrapped": outer.state_dict()}
    dcp.save(state, checkpoint_id=folder / "axes")
    dcp.async_save(state, checkpoint_id=folder / "async").result()
    result: Result = {}
    writer = HuggingFaceStorageWriter(str(folder / "hf"), save_distributed=True, enable_consolidation=True)
    try:
        dcp.save(model.state_dict(), storage_writer=writer)
    except CheckpointException as error:  # a BaseException
        result["consolidated"] = str(error)
    unmarked = {name: plain(x) for name, x in model.state_dict().items()}
    dcp.save(unmarked, checkpoint_id=folder / "unmarked")
    dense = dense_run("llama", 2)[0]
    for name, keys in (("axes", ("model", "wrapped")), ("async", ("model",))):
        for key in keys:
            again, _ = _parallel("llama", 4, seed=1)
            prefix = "module." if key == "wrapped" else ""
            loaded = {key: {prefix + n: x for n, x in again.state_dict().items()}}
            dcp.load(loaded, checkpoint_id=folder / name)
            again.load_state_dict({n.removeprefix(prefix): x for n, x in loaded[key].items()})
            result[f"{name} {key}"] = far(dense, again)
    again, _ = _parallel("llama", 4, seed=1)
    try:
        dcp.load(again.state_dict(), checkpoint_id=folder / "unmarked")
    except CheckpointException as error:  # a BaseException
        result["unmarked"] = str(error)
    result["control"] = far(dense, again)
    return result


def _solo() -> nn.Module:
    """The same model, not split."""
    model, inputs = make("llama", 1, 9)
    return autotp.parallelize(model, 1, example_inputs=inputs, mesh=_own_group())


def _own_group() -> Any:
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    return groups[dist.get_rank()]
