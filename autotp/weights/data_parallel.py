"""data_parallel: refuse data parallelism over ranks that hold different shards of a parallelized model.

``DistributedDataParallel(model)`` takes all processes for copies of one model. Where they are tensor-parallel ranks, it
would overwrite their shards with rank 0's, average gradients of different shards, and train on with a plausible loss.
So from the first ``parallelize`` on, the constructors of torch's wrappers look at the parameters and at the process
group that they get. They raise on every rank, before anything has changed, where two ranks of the group hold different
shards of a parameter. Accelerate, transformers' Trainer and Lightning construct the same wrappers. ``all_reduce`` and
``broadcast`` look at their tensor, too. Unsplit parameters may be wrapped: they are the same on all ranks.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from autotp.distributed.mesh import Mesh
from autotp.errors import AutoTPError
from autotp.utils.value_types import DTENSOR, is_a
from autotp.weights.registry import Sharded, living, registered

__all__ = ["guard_data_parallelism", "refuse_wrapped"]

_Arguments = Mapping[str, Any]


class _Door(NamedTuple):
    """A function of torch that takes parameters and the process group over which it keeps them equal.

    Attributes:
        module: the module that defines it.
        path: its name there.
        subject: the argument with the module, the parameters or the parameter groups.
        usage: a format, with ``name``, ``group`` and ``mesh``, of the call that is right; empty where no call is.
    """

    module: str
    path: str
    subject: str
    usage: str


_DDP = "torch.nn.parallel.distributed"
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
_FSDP2 = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_AVERAGE = "torch.distributed.algorithms.model_averaging.utils"
_USE_DDP = "DistributedDataParallel(model, process_group={group})"
_USE_ZERO = "ZeroRedundancyOptimizer(model.parameters(), ..., process_group={group})"
_DOORS = (
    _Door(_DDP, "DistributedDataParallel.__init__", "module", _USE_DDP),
    _Door(_FSDP1, "FullyShardedDataParallel.__init__", "module", _USE_DDP),
    _Door(_ZERO, "ZeroRedundancyOptimizer.__init__", "params", _USE_ZERO),
    _Door(_FSDP2, "FSDPParamGroup.__init__", "params", "{name}(model, mesh={mesh})"),
    _Door(_AVERAGE, "average_parameters", "params", "PeriodicModelAverager(..., process_group={group})"),
    _Door("torch.nn.parallel.data_parallel", "DataParallel.__init__", "module", ""),
)
"""FSDP2's ``fully_shard`` and ``replicate`` are imported by name: what they have in common is the parameter group."""

_HOLDERS = ((_DDP, "DistributedDataParallel"), (_FSDP1, "FullyShardedDataParallel"), (_ZERO, "ZeroRedundancyOptimizer"))

_same: weakref.WeakKeyDictionary[Sharded, set[str]] = weakref.WeakKeyDictionary()
"""Per model, the names of the groups whose ranks have compared that they hold the same shards."""


def guard_data_parallelism() -> None:
    """Let torch's data-parallel wrappers refuse ranks that hold different shards of a model."""
    for door in _DOORS:
        holder: Any = None
        with contextlib.suppress(ImportError):  # a torch without it
            holder = importlib.import_module(door.module)
        *classes, name = door.path.split(".")
        for cls in classes:
            holder = getattr(holder, cls, None)
        function = getattr(holder, name, None)
        if function is not None and not hasattr(function, "_autotp"):
            setattr(holder, name, _guarded(door, function))
    for name in ("all_reduce", "broadcast"):
        _guard_collective(getattr(dist, name))


def refuse_wrapped(model: nn.Module, tp: int) -> None:
    """Refuse a model that a data-parallel wrapper or optimizer holds from before: it keeps buffers of dense shapes.

    Raises:
        AutoTPError: there is one; nothing has been changed.
    """
    holder = _holder(model) if tp > 1 and dist.is_initialized() else None
    if holder is not None:
        gc.collect()  # it may be garbage
        holder = _holder(model)
    if holder is not None:
        raise AutoTPError(
            f"a {holder} was made around this {type(model).__name__}, or around parameters of it, before "
            "autotp.parallelize: it would mix the shards of different ranks. Parallelize the model first; make the "
            f"{holder} then, over the ranks that hold the same shard"
        )


def _holder(model: nn.Module) -> str | None:
    """The class of a wrapper or optimizer that holds parameters of a dense model."""
    classes = tuple(getattr(sys.modules[module], name) for module, name in _HOLDERS if module in sys.modules)
    ids = {id(p) for p in model.parameters()}
    for holder in gc.get_objects():
        if issubclass(type(holder), classes):
            with contextlib.suppress(Exception):  # one that is half made
                subject = holder if isinstance(holder, nn.Module) else holder.param_groups
                if any(id(p) in ids for p in _parameters(subject)):
                    return type(holder).__name__
    return None


def _guarded(door: _Door, function: Callable[..., Any]) -> Callable[..., Any]:
    """One of torch's functions, which checks its parameters and its group first."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # torch says what is wrong
            return function(*args, **kwargs)
        arguments = bound.arguments
        if (subject := _unrolled(arguments.get(door.subject))) is not None:
            arguments[door.subject] = subject
        try:
            _check(_name(door, arguments), door.usage, list(_parameters(subject)), _groups(arguments))
        except AutoTPError:
            if "mesh_info" in arguments:
                _undo_fully_shard(arguments.get("modules", ()))
            raise
        return function(*bound.args, **bound.kwargs)

    guarded._autotp = True  # type: ignore[attr-defined]
    return guarded


def _name(door: _Door, arguments: _Arguments) -> str:
    """The name of a wrapper as a user knows it."""
    if "mesh_info" in arguments:
        return "replicate" if type(arguments["mesh_info"]).__name__ == "DDPMeshInfo" else "fully_shard"
    return type(arguments["self"]).__name__ if "self" in arguments else door.path


def _unrolled(subject: Any) -> Any:
    """The same, with a list for each iterator, which a look at it would use up."""
    if isinstance(subject, Mapping) and "params" in subject:
        return {**subject, "params": _unrolled(subject["params"])}
    return [_unrolled(item) for item in subject] if isinstance(subject, (list, Iterator)) else subject


def _parameters(subject: Any) -> Iterator[nn.Parameter]:
    """The parameters of a module, of parameter groups, or in a list."""
    if isinstance(subject, nn.Module):
        yield from subject.parameters()
    elif isinstance(subject, torch.Tensor):
        yield subject  # type: ignore[misc]
    elif isinstance(subject, Mapping):
        yield from _parameters(subject.get("params", ()))
    elif isinstance(subject, (list, tuple, set)):
        for item in subject:
            yield from _parameters(item)


def _groups(arguments: _Arguments) -> list[Any]:
    """The process groups over which a function would keep parameters equal."""
    mesh = arguments.get("device_mesh")
    if (info := arguments.get("mesh_info")) is not None:
        named = [getattr(info, f"{kind}_process_group", None) for kind in ("shard", "replicate")]
        if any(g is not None for g in named):
            return [g for g in named if g is not None]
        mesh = info.mesh
    if mesh is not None:
        return list(mesh.get_all_groups())
    group = arguments.get("process_group")
    groups = list(group) if isinstance(group, (tuple, list)) else [group]
    world = dist.group.WORLD if dist.is_initialized() else None
    return [g or world for g in groups if g or world]


def _check(name: str, usage: str, parameters: list[nn.Parameter], groups: list[Any]) -> None:
    """Raise if ranks of a group hold different shards of the parameters.

    The ranks of one tensor-parallel group know each other. Whether ranks of different ones hold the same shards, they
    ask each other, once per model and group.
    """
    ids = {id(p) for p in parameters}
    for model in living():
        if model.mesh.tp == 1 or not any(shards and id(p) in ids for _, p, shards in model.placed()):
            continue
        if not usage:
            raise AutoTPError(
                f"{name} copies a module to the devices of one process, and this {model.agreement.model} is split over "
                f"{model.mesh.tp} processes of one device each: leave {name} out"
            )
        for group in groups:
            _check_group(name, usage, model, group)


def _check_group(name: str, usage: str, model: Sharded, group: Any) -> None:
    if dist.get_rank(group) < 0:  # torch says what is wrong
        return
    ranks = dist.get_process_group_ranks(group)
    if _differ(model.mesh, ranks):
        raise AutoTPError(_message(name, usage, model, ranks))
    compared = _same.setdefault(model, set())
    if len(ranks) == 1 or group.group_name in compared:
        return
    positions: list[Any] = [None] * len(ranks)
    dist.all_gather_object(positions, (model.mesh.rank, model.mesh.tp), group=group)
    if len(set(positions)) > 1:
        raise AutoTPError(_message(name, usage, model, ranks))
    compared.add(group.group_name)


def _differ(mesh: Mesh, ranks: list[int]) -> bool:
    """Whether two of these ranks belong to one tensor-parallel group."""
    return len({*ranks} & {*dist.get_process_group_ranks(mesh.group)}) > 1


def _message(name: str, usage: str, model: Sharded, ranks: list[int]) -> str:
    own = dist.get_process_group_ranks(model.mesh.group)
    first, tp, world = own[0], model.mesh.tp, dist.get_world_size()
    text = (
        f"{name} over ranks {_listed(ranks)} would mix different shards: this {model.agreement.model} is split over "
        f"ranks {_listed(own)} (tp={tp}). "
    )
    if world == tp:
        text += (
            f"No two of the {world} processes hold the same shard, so there is no data parallelism: leave it out, the "
            f"model trains on all of them as it is. For data parallelism start a multiple of {tp} processes"
        )
        accelerate = ". Accelerate leaves it out in accelerator.prepare_model(model, evaluation_mode=True)"
        return text + (accelerate if "accelerate" in sys.modules else "")
    if own != list(range(first, first + tp)) or first % tp or world % tp:
        call = usage.format(name=name, group="group", mesh="mesh")
        return text + f"Pass the ranks that hold the same shard as this one: {call}"
    call = usage.format(name=name, group='mesh["dp"].get_group()', mesh='mesh["dp"]')
    return text + (
        f"Pass the ranks that hold the same shard as this one, ranks {_listed(range(model.mesh.rank, world, tp))}: "
        f'{call}, where mesh = init_device_mesh(device_type, ({world // tp}, {tp}), mesh_dim_names=("dp", "tp"))'
    )


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def _undo_fully_shard(modules: Iterable[nn.Module]) -> None:
    """Take back what ``fully_shard`` does before it has parameters, so that the module is as it was.

    Nothing of it is public. Where a torch release does it in another way, the module keeps hooks of FSDP2, which raise
    at the next call.
    """
    with contextlib.suppress(Exception):
        contract = importlib.import_module("torch.distributed._composable.contract")
        from torch.distributed._composable_state import _module_state_mapping

        for module in modules:
            state: Any = _module_state_mapping.pop(module)()
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
            states, registry = (module.__dict__[key] for key in (contract.STATE_KEY, contract.REGISTRY_KEY))
            for function in [f for f, s in states.items() if s is state]:
                del states[function], registry[function.__name__]
            for key in (contract.STATE_KEY, contract.REGISTRY_KEY):
                if not module.__dict__[key]:
                    del module.__dict__[key]


def _guard_collective(function: Any) -> None:
    """Let one of torch's collectives refuse split parameters, and gradients of them, over ranks of one model.

    The function inside the wrapper that logs errors is replaced, so that it also runs where a script has imported the
    wrapper before. Where a torch release has no such wrapper, collectives stay as they are.
    """
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cell = function.__closure__[names.index("func")] if "func" in names else None
    if cell is None or hasattr(cell.cell_contents, "_autotp"):
        return
    original = cell.cell_contents
    position = list(inspect.signature(original).parameters).index("group")

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs.get("tensor")
        if isinstance(tensor, torch.Tensor) and tensor.numel() in _sizes(registered()):
            group = args[position] if len(args) > position else kwargs.get("group")
            _check_tensor(original.__name__, tensor, group or dist.group.WORLD)
        return original(*args, **kwargs)

    checked._autotp = True  # type: ignore[attr-defined]
    cell.cell_contents = checked


@functools.lru_cache(1)
def _sizes(count: int) -> frozenset[int]:
    """The sizes of all split parameters, where so many models have been registered: most tensors have another size."""
    models = [model for model in living() if model.mesh.tp > 1]
    return frozenset(p.numel() for model in models for _, p, shards in model.placed() if shards) - {0}


def _check_tensor(name: str, tensor: torch.Tensor, group: Any) -> None:
    """Raise if a tensor is a split parameter, or its gradient, and ranks of the group hold different shards."""

    def place(t: torch.Tensor | None) -> Any:
        plain = t is not None and t.layout is torch.strided and not is_a(t, DTENSOR)
        return (t.device, t.data_ptr(), t.numel()) if plain and t is not None else None

    if (where := place(tensor)) is None:
        return
    for model in living():
        if model.mesh.tp == 1 or not _differ(model.mesh, ranks := dist.get_process_group_ranks(group)):
            continue
        for parameter, p, shards in model.placed():
            for what, t in (("", p), ("the gradient of ", p.grad)) if shards else ():
                if place(t) == where:
                    called = f"{name} of {what}{parameter}"
                    raise AutoTPError(_message(called, name + "(tensor, group={group})", model, ranks))
