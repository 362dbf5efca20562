"""parallelize: a dense model becomes this rank's part of a tensor-parallel one, in place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.calls import Programs
from autotp.capture import capturing, flatten_call, tied_names
from autotp.errors import AutoTPError
from autotp.inputs import ExampleInputs, device_of, example_call
from autotp.parts import Division, divide, install
from autotp.plan import Plan
from autotp.process import Mesh, ProcessFabric, join
from autotp.rewrite import RankGraph
from autotp.shards import joined, local_part, shards_of
from passes import Layout, fabric

__all__ = ["full_gradients", "full_state_dict", "graph", "parallelize"]


class _Carried:
    """What a parallelized module carries: its place among the ranks, and the forward of its own."""

    def __init__(self, module: nn.Module, mesh: Mesh, fabric: ProcessFabric) -> None:
        self.mesh, self.fabric = mesh, fabric
        self.tied = tied_names(module)
        self.own_forward = module.__dict__.get("forward")

    @property
    def stored(self) -> Mapping[str, Layout]:
        """The split weights' layouts, by name."""
        raise NotImplementedError

    def whole(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """The full tensor of which each rank holds ``local`` under this name. Collective."""
        shards = shards_of(self.stored, self.tied.get(name, name))
        if not shards:
            return local.detach().clone()
        shapes = [list(local.shape) for _ in range(self.mesh.tp)]
        for dim, s in shards.items():
            for rank, count in enumerate(s.counts):
                shapes[rank][dim] = count
        return joined(self.fabric.group("tp").all_gather(local.detach(), shapes), shards)


class _Runtime(_Carried):
    """A module that runs its programs: a whole model, or a part of one."""

    def __init__(self, model: nn.Module, mesh: Mesh, programs: Programs, fabric: ProcessFabric) -> None:
        super().__init__(model, mesh, fabric)
        self.programs = programs
        self.restart: Callable[[], None] | None = None

    @property
    def stored(self) -> Mapping[str, Layout]:
        """The split weights' layouts, by name."""
        return self.programs.stored or {}

    def guard(self, model: nn.Module) -> None:
        """Let submodules that hold shards refuse to be called: their own code computes on whole weights."""

        def refusal(name: str) -> Any:
            def refuse(module: nn.Module, args: Any) -> None:
                if not capturing():
                    raise AutoTPError(
                        f"{name} holds only this rank's share of its weights and cannot be called by itself: call the "
                        "model that was parallelized, or parallelize this module instead of the whole"
                    )

            return refuse

        for name, module in model.named_modules():
            inside = [f"{name}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)]
            if "_autotp" not in module.__dict__ and any(self.tied.get(n, n) in self.stored for n in inside):
                module.register_forward_pre_hook(refusal(name))

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        program, tensors = self.programs.find(args, kwargs)
        run = self.programs.graph(program, self.mesh.rank)
        if self.restart is not None and program.random:
            self.restart()
        with fabric.use(self.fabric):
            return program.unflatten(run(*tensors))


class _Divided(_Carried):
    """A model that runs its own Python between parts that run their programs.

    That Python must do the same on every rank: it draws its random numbers from a stream of its own
    that all ranks share. A part's streams start anew at each call from a number drawn from it, so that
    a part that is run twice by activation checkpointing drops the same elements both times.
    """

    def __init__(self, division: Division, mesh: Mesh, seed: int) -> None:
        super().__init__(division.model, mesh, ProcessFabric(mesh, seed))
        self.division = division
        self.forward = division.model.forward
        self.between = ProcessFabric(mesh, seed + 1 + mesh.tp)
        self.devices = {torch.device("cpu"), device_of(division.model)}
        self.touches = division.outside_of_parts()
        self.running = False

    @property
    def stored(self) -> Mapping[str, Layout]:
        """The split weights' layouts, by name."""
        return self.division.stored

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with contextlib.ExitStack() as around:
            for device in self.devices:
                around.enter_context(self.between.random(True, device))
            around.enter_context(self.touches)
            before, self.running = self.running, True
            try:
                return self.forward(*args, **kwargs)
            finally:
                self.running = before

    def restart(self) -> None:
        """Start the parts' streams of random numbers anew."""
        drawn = int(torch.empty((), dtype=torch.int64).random_(1 << 62))
        # called by itself, or again in a backward: what rank 0 draws counts
        self.fabric.restart(drawn if self.running else self.mesh.gathered(drawn)[0])

    def run(self, part: _Runtime, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a part."""
        suspended, self.touches.suspended = self.touches.suspended, True
        try:
            return part(args, kwargs)
        finally:
            self.touches.suspended = suspended


def _carried(model: nn.Module) -> _Carried:
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
    they were; ``forward`` runs the rewritten graph, forward and backward, on every rank. A model that
    cannot be captured whole runs its own Python between its largest parts that can be, and a
    PartialCaptureWarning names the places.

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
        CaptureError: the model cannot be captured, and no part of it either; nothing has been changed.
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
        division = divide(model, tp, args, kwargs, plan.stored if plan is not None else None)
    division.warn()
    stored = division.stored
    place.agree({"parts": [p.path for p in division.parts]} | {f"layout of {n}": str(x) for n, x in stored.items()})
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
    if division.is_whole:
        runtime = _Runtime(model, place, division.parts[0].programs, ProcessFabric(place, seed))
        install(model, runtime, runtime)
        runtime.guard(model)
        return model
    divided = _Divided(division, place, seed)
    runtimes = [_Runtime(p.module, place, p.programs, divided.fabric) for p in division.parts]
    for part, runtime in zip(division.parts, runtimes, strict=True):
        part.calls.clear()  # they hold values of the example
        runtime.restart = divided.restart
        install(part.module, functools.partial(divided.run, runtime), runtime)
    install(model, divided, divided)
    for part, runtime in zip(division.parts, runtimes, strict=True):
        runtime.guard(part.module)
    return model


def graph(model: nn.Module) -> RankGraph:
    """The rewritten ``fx.GraphModule`` of this rank that the model ran, or was prepared for, last.

    Args:
        model: a parallelized model; of one that was captured in parts, the module that is a part.

    Raises:
        AutoTPError: the model is not parallelized, or runs as several graphs; it lists them.

    Example:
        >>> print(autotp.graph(model))
    """
    runtime = _carried(model)
    if isinstance(runtime, _Divided):
        paths = ", ".join(f"model.{p.path}" for p in runtime.division.parts)
        raise AutoTPError(f"this {type(model).__name__} runs as a graph for each of its parts: pass one of {paths}")
    assert isinstance(runtime, _Runtime)
    assert runtime.programs.last is not None
    return runtime.programs.graph(runtime.programs.last, runtime.mesh.rank)


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The dense model's state dict, full tensors, on every rank. Collective: all ranks must call it."""
    runtime = _carried(model)
    return {name: runtime.whole(name, t) for name, t in model.state_dict().items()}


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The dense model's gradients by parameter name, full tensors, on every rank; None where there is
    none. Collective: all ranks must call it."""
    runtime = _carried(model)
    return {n: None if p.grad is None else runtime.whole(n, p.grad) for n, p in model.named_parameters()}
