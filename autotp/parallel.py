"""parallelize: a dense model becomes this rank's part of a tensor-parallel one, in place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.calls import Programs
from autotp.capture import Dense, flatten_call, tied_names
from autotp.errors import AutoTPError
from autotp.inputs import ExampleInputs, example_call
from autotp.plan import Plan
from autotp.process import Mesh, ProcessFabric, join
from autotp.rewrite import RankGraph
from autotp.shards import joined, local_part, shards_of
from passes import fabric

__all__ = ["full_gradients", "full_state_dict", "graph", "parallelize"]


class _Runtime:
    """What a parallelized model carries: its place among the ranks and its programs."""

    def __init__(self, model: nn.Module, mesh: Mesh, programs: Programs, seed: int) -> None:
        self.mesh, self.programs = mesh, programs
        self.fabric = ProcessFabric(mesh, seed)
        self.tied = tied_names(model)
        self.own_forward = model.__dict__.get("forward")
        self.capturing = False

    def guard(self, model: nn.Module) -> None:
        """Let submodules that hold shards refuse to be called: their own code computes on whole weights."""
        stored = self.programs.stored or {}

        def refusal(name: str) -> Any:
            def refuse(module: nn.Module, args: Any) -> None:
                if not self.capturing:
                    raise AutoTPError(
                        f"{name} holds only this rank's share of its weights and cannot be called by itself: call the "
                        "model that was parallelized, or parallelize this module instead of the whole"
                    )

            return refuse

        for name, module in model.named_modules():
            inside = [f"{name}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)]
            if name and any(self.tied.get(n, n) in stored for n in inside):
                module.register_forward_pre_hook(refusal(name))

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        program, tensors = self.programs.find(args, kwargs)
        run = self.programs.graph(program, self.mesh.rank)
        with fabric.use(self.fabric):
            return program.unflatten(run(*tensors))

    def whole(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """The full tensor of which each rank holds ``local`` under this name. Collective."""
        shards = shards_of(self.programs.stored or {}, self.tied.get(name, name))
        if not shards:
            return local.detach().clone()
        shapes = [list(local.shape) for _ in range(self.mesh.tp)]
        for dim, s in shards.items():
            for rank, count in enumerate(s.counts):
                shapes[rank][dim] = count
        return joined(self.fabric.group("tp").all_gather(local.detach(), shapes), shards)


def _runtime(model: nn.Module) -> _Runtime:
    runtime = model.__dict__.get("_autotp")
    if runtime is None:
        raise AutoTPError(
            f"this {type(model).__name__} is not parallelized: call autotp.parallelize(model, tp=...) first"
        )
    return runtime


def _checksum(tensor: torch.Tensor) -> int:
    """A 64-bit sum over a tensor's bytes, weighted by position; equal for equal tensors."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    rest = flat.numel() % 4
    total = 0
    if rest:
        total, flat = int(flat[-rest:].sum()) + 1, flat[:-rest]
    words = flat.view(torch.int32)
    for start in range(0, words.numel(), 1 << 22):  # in pieces: int64 copies of a large weight would not fit
        piece = words[start : start + (1 << 22)].to(torch.int64)
        weights = torch.arange(1, piece.numel() + 1, device=piece.device) % 65521 + start % 65521
        total = (total * 1000003 + int((piece * weights).sum())) % (1 << 64)
    return total


def _share_weights(model: nn.Module, mesh: Mesh) -> int:
    """Overwrite parameters and buffers by rank 0's where they differ; how many did."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    sums = mesh.gathered({name: _checksum(t) for name, t in tensors.items()})
    differing = [name for name in tensors if any(each[name] != sums[0][name] for each in sums)]
    with torch.no_grad():
        for name in differing:
            data = tensors[name].detach()
            whole = data.contiguous()
            mesh.broadcast(whole)
            if whole.data_ptr() != data.data_ptr():
                data.copy_(whole)
    return len(differing)


def _structure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What ranks must agree in: the model's class, weights and mode, and the inputs' structure."""
    leaves, spec = flatten_call(args, kwargs)
    found = {"model": f"{type(model).__module__}.{type(model).__qualname__}", "training": model.training}
    named = [("parameter", model.named_parameters()), ("buffer", model.named_buffers())]
    for kind, tensors in named:
        found |= {f"{kind} {n}": f"{tuple(t.shape)} {t.dtype}" for n, t in tensors}
    found["structure of the inputs"] = str(spec)
    for i, leaf in enumerate(leaves):
        found[f"input {i}"] = f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else repr(leaf)
    return found


def parallelize(
    model: nn.Module,
    tp: int,
    *,
    example_inputs: ExampleInputs = None,
    mesh: DeviceMesh | dist.ProcessGroup | None = None,
    backend: str | None = None,
    plan: Plan | None = None,
) -> nn.Module:
    """Split ``model`` over ``tp`` ranks, in place, and return it.

    The model is captured as an fx graph, rewritten so that each rank computes its part, and its weights
    are cut to what the rank holds. Class, config, ``state_dict`` keys, signature and outputs stay as
    they were; ``forward`` runs the rewritten graph, forward and backward, on every rank.

    Args:
        model: the dense model, the same on every rank. Where weights differ, rank 0's are taken.
        tp: the number of ranks to split over. With more processes than that, consecutive ranks form
            groups.
        example_inputs: a tuple of positional or a dict of keyword inputs to capture the model with;
            batch and sequence stay dynamic. Left out, a transformers model's ``dummy_inputs`` are
            taken, or inputs that the first layers suggest.
        mesh: a one-dimensional DeviceMesh, or a process group, of ``tp`` ranks.
        backend: the backend to start a process group with, if there is none; ``nccl`` where CUDA is,
            ``gloo`` else.
        plan: a plan from :func:`autotp.plan` to follow.

    Returns:
        The same object.

    Raises:
        LaunchError: there is no process group and no launcher's environment; it shows what to type.
        MismatchError: ranks differ in ``tp``, in the model, or in the inputs' structure. All raise.
        CaptureError: the model cannot be captured; nothing has been changed.
        PlanError: the plan is for another model or another ``tp``.

    Example:
        >>> model = autotp.parallelize(model, tp=4)  # under torchrun --nproc-per-node 4
        >>> model(input_ids=ids).logits
    """
    if "_autotp" in model.__dict__:
        raise AutoTPError(f"this {type(model).__name__} is parallelized already")
    place = join(tp, mesh, backend)
    with place.together("finding example inputs"):
        meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
        if meta is not None:
            raise AutoTPError(f"{meta} is on the meta device: load its weights (model.to_empty, load_state_dict) first")
        args, kwargs = example_call(model, example_inputs)
    place.agree(_structure(model, args, kwargs))
    with place.together("rewriting the model"):
        if plan is not None:
            plan.check(model, tp)
        programs = Programs(model, tp, Dense.of(model), plan.stored if plan is not None else None)
        programs.find(args, kwargs)
    stored = dict(programs.stored or {})
    place.agree({f"layout of {name}": str(layout) for name, layout in stored.items()})
    _share_weights(model, place)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shards = shards_of(stored, name)
            if shards:
                grad, parameter.grad = parameter.grad, None
                parameter.data = local_part(parameter.data, shards, place.rank).clone()
                if grad is not None:
                    parameter.grad = local_part(grad, shards, place.rank).clone()
    seed = place.gathered(torch.initial_seed() % (1 << 62))[0]
    runtime = _Runtime(model, place, programs, seed)

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return runtime(args, kwargs)

    model.__dict__["_autotp"] = runtime
    model.__dict__["forward"] = forward
    runtime.guard(model)
    return model


def graph(model: nn.Module) -> RankGraph:
    """The rewritten ``fx.GraphModule`` of this rank that the model ran, or was prepared for, last.

    Example:
        >>> print(autotp.graph(model))
    """
    runtime = _runtime(model)
    assert runtime.programs.last is not None
    return runtime.programs.graph(runtime.programs.last, runtime.mesh.rank)


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The dense model's state dict, full tensors, on every rank. Collective: all ranks must call it."""
    runtime = _runtime(model)
    return {name: runtime.whole(name, t) for name, t in model.state_dict().items()}


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The dense model's gradients by parameter name, full tensors, on every rank; None where there is
    none. Collective: all ranks must call it."""
    runtime = _runtime(model)
    return {n: None if p.grad is None else runtime.whole(n, p.grad) for n, p in model.named_parameters()}
