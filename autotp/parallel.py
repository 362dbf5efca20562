"""parallelize: a dense model becomes this rank's part of a tensor-parallel one, in place."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from autotp.arguments.arguments import Arguments
from autotp.capture.example_inputs import ExampleInputs, example_call
from autotp.distributed.agreement import Agreement
from autotp.distributed.mesh import TIMEOUT, Mesh, join
from autotp.distributed.process_context import ProcessContext
from autotp.errors import AutoTPError, CaptureError
from autotp.modules.device import computing_on, device_of
from autotp.modules.model_checks import check_model
from autotp.partition.partition import Partition, partition_into_modules, partition_model
from autotp.partition.partitioned_runtime import PartitionedRuntime
from autotp.plans.make_plan import announce, plan_of
from autotp.plans.plan import Plan
from autotp.runtime.graph_runtime import GraphRuntime
from autotp.runtime.runtime import Runtime
from autotp.weights.checkpoint import Source, open_checkpoint
from autotp.weights.load_checkpoint import first_elements, match_checkpoint, read_shards, refuse_empty
from autotp.weights.shard_parameters import assign_shards, broadcast_parameters, shard_parameters
from passes import Lowering

__all__ = ["parallelize"]


def _structure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What ranks must agree in: the model's class, weights and mode, and the inputs' structure."""
    of = Arguments(args, kwargs)
    found: dict[str, Any] = {"model": f"{type(model).__module__}.{type(model).__qualname__}"}
    found |= {f"training of {n or 'the model'}": m.training for n, m in model.named_modules()}
    named = [("parameter", model.named_parameters()), ("buffer", model.named_buffers())]
    for kind, tensors in named:
        found |= {f"{kind} {n}": f"{tuple(t.shape)} {t.dtype}" for n, t in tensors}
    found["structure of the inputs"] = str(of.spec)
    for i, leaf in enumerate(of.leaves):
        found[f"input {i}"] = f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else repr(leaf)
    return found


def parallelize(
    model: nn.Module,
    tp: int,
    *,
    weights: Source | None = None,
    device: torch.device | str | None = None,
    example_inputs: ExampleInputs = None,
    mesh: DeviceMesh | dist.ProcessGroup | None = None,
    backend: str | None = None,
    plan: Plan | None = None,
    timeout: timedelta = TIMEOUT,
    debug: bool = False,
    strict: bool = False,
    check: bool | str = True,
    shared_memory: bool = True,
    symmetric_memory: bool = False,
    broadcast_inputs: bool = False,
    lowering: bool | Lowering = True,
    exact: bool = False,
    compile: bool | str | Mapping[str, Any] = False,
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
        weights: a checkpoint, of which each rank reads its share and no more; what the parameters and persistent
            buffers were before counts no longer, and they may be on the meta device (:func:`autotp.empty_weights`). A
            ``.safetensors`` file, a state dict that ``torch.save`` wrote, a folder in which transformers saves a
            model (files and index), or a mapping from names to tensors, or to what has a shape and a dtype and gives
            parts when sliced. As strict as ``load_state_dict``; of tied weights one name suffices; the dtype is
            the model's.
        device: where the shares go. Left out, they stay where the model is; from the meta device they go to this
            process's GPU if the group's backend has one, to the CPU else.
        example_inputs: a tuple of positional or a dict of keyword inputs to capture the model with;
            batch and sequence stay dynamic. Left out, a transformers model's ``dummy_inputs`` are
            taken, or inputs that the first layers suggest.
        mesh: a one-dimensional DeviceMesh, or a process group, of ``tp`` ranks.
        backend: the backend to start a process group with, if there is none; ``nccl`` where CUDA is,
            ``gloo`` else.
        plan: a plan from :func:`autotp.plan` to follow.
        timeout: how long a rank waits for the others, at the start of each call and in groups of processes
            that are started here; then it raises, and says who did not come.
        debug: let the ranks compare the values of each call's inputs, and of the parameters that all hold
            whole, not only the call's structure. Every rank reads all of them at each call.
        strict: refuse what is otherwise a warning: weights, 1% of the parameters or more, that have too few pieces
            for so many ranks and so stay whole on all of them, and a model, or a later call, that is captured in parts.
        check: run a rewritten graph only if it is proved to compute, on every rank, what the dense model does,
            values and every gradient (:func:`passes.check`); that takes a few percent of the time to make it.
            ``"warn"`` runs an unproved one with an UnprovedWarning, False proves nothing.
        shared_memory: on CPUs, let ranks that share a host exchange values through memory that they map, which takes
            microseconds where gloo takes half a millisecond; False leaves all to the process group.
        symmetric_memory: on GPUs of one host that NVLink joins, add up what is small (half a MiB, a quarter for more
            than 4 ranks) by the one-shot kernel of torch's symmetric memory, where a trial shows that it works. The
            kernel knows no ``timeout``: a rank that dies within a call leaves the others to whoever started them.
        broadcast_inputs: where the inputs of a call, or of ``generate``, differ between ranks, take rank 0's on all of
            them; left out, that is an error on all of them. Calls compare the values of integers on the CPU (token
            ids, masks), and with ``debug`` of all inputs; ``generate`` compares those of all.
        lowering: which passes make the rewritten graphs faster before they run (:class:`autotp.Lowering`); True: all;
            False: none, the graphs run as ``autotp.graph`` prints them.
        exact: leave out those of them that call other kernels than the model does, and so round differently.
        compile: let ``torch.compile`` make one program of each graph, collectives included, without a graph break; a
            mode, or a dict of its options. Layers that repeat are compiled once. A graph that draws random numbers runs
            as it is. Without a backward, sizes are dynamic; with one, each size is compiled by itself, and a graph that
            met too many runs as it is. What ``torch.compile(model)`` returns does the same for a model that was
            parallelized without.

    Returns:
        The same object.

    Raises:
        LaunchError: there is no process group and no launcher's environment; it shows what to type.
        MismatchError: ranks differ in ``tp``, in the model, or in the inputs' structure. All raise.
        CaptureError: the model cannot be captured, and no part of it either; it is as it was, with rank 0's
            weights. With ``weights``, also where it can be captured in parts only.
        WeightsError: the checkpoint cannot be read, or does not fit the model: it names what is missing, unexpected,
            or has another shape. Nothing has been changed.
        PlanError: the plan is for another model or another ``tp``; with ``strict``, something stays whole that is
            worth splitting. It names the layer, the line of its code, the reason and the ``tp`` that would do.
        ProofError: a graph is not proved (a mistake of autotp's); it names the node, the line, and what would be wrong.
        AutoTPError: the model is compiled, wrapped or quantized; nothing has been changed.

    Afterwards calls, ``generate``, ``full_state_dict``, ``full_gradients`` and ``clip_grad_norm_`` are compared among
    the ranks before they start: a MismatchError on all of them says what differs. In ``generate`` all ranks draw rank
    0's random numbers.

    Example:
        >>> model = autotp.parallelize(model, tp=4)  # under torchrun --nproc-per-node 4
        >>> model(input_ids=ids).logits
    """
    if check not in (True, False, "warn"):
        raise ValueError(f'check is True, False or "warn", not {check!r}')
    if "_autotp" in model.__dict__:
        raise AutoTPError(f"this {type(model).__name__} is parallelized already")
    passes = lowering if isinstance(lowering, Lowering) else Lowering() if lowering else Lowering.none()
    options = {"mode": compile} if isinstance(compile, str) else dict(compile) if isinstance(compile, Mapping) else {}
    fast = _Fast(passes.exactly() if exact else passes, options if compile else None)
    with torch.inference_mode(False):  # else the shards would be tensors that never train
        return _parallelize(
            model, join(tp, mesh, backend, timeout), weights, device, example_inputs, plan, timeout, debug, strict,
            check, shared_memory, symmetric_memory, broadcast_inputs, fast,
        )  # fmt: skip


@dataclass(frozen=True)
class _Fast:
    """How graphs are made fast: the passes, and options for ``torch.compile``, if they are to be compiled."""

    lowering: Lowering
    compiled: dict[str, Any] | None

    def __str__(self) -> str:
        compiled = {k: getattr(v, "__qualname__", v) for k, v in (self.compiled or {}).items()}
        return f"{self.lowering}, {'compiled' if self.compiled is not None else 'not compiled'} {compiled or ''}"


def _parallelize(
    model: nn.Module, place: Mesh, weights: Source | None, device: torch.device | str | None,
    example_inputs: ExampleInputs, plan: Plan | None, timeout: timedelta, debug: bool, strict: bool, check: bool | str,
    shared_memory: bool, symmetric_memory: bool, broadcast_inputs: bool, fast: _Fast,
) -> nn.Module:  # fmt: skip
    with place.together("finding example inputs"):
        refuse_empty(model, weights is not None)
        check_model(model)
        to = _destination(model, place, device)
        with computing_on(to):
            args, kwargs = _on(to, *example_call(model, example_inputs))
    with place.together("looking at the weights"):
        found = open_checkpoint(weights) if weights is not None else {}
        sources = match_checkpoint(model, found) if weights is not None else {}
        first = first_elements(sources)
    described = {f"{name} in the weights": f"{t.shape} {t.dtype}" for name, t in found.items()}
    described |= {f"first elements of {name} in the weights": f"{n:x}" for name, n in first.items()}
    given = {"debug": debug, "timeout": timeout, "strict": strict, "check": check, "shared_memory": shared_memory,
             "symmetric_memory": symmetric_memory, "broadcast_inputs": broadcast_inputs,
             "how graphs are made fast": str(fast)}  # fmt: skip
    place.agree(given | described | _structure(model, args, kwargs))
    with computing_on(to):
        division = _division(model, place, args, kwargs, plan, weights is not None)
    with place.together("proving the graphs"):
        for part in division.parts:
            part.programs.lowering, part.programs.compiled = fast.lowering, fast.compiled
            part.programs.prove(check)
    with place.together("looking at what stays whole"):
        announce(plan_of(division, place.tp), division, strict, stacklevel=4)
    layouts = division.weight_layouts
    place.agree({"parts": [p.path for p in division.parts]} | {f"layout of {n}": str(x) for n, x in layouts.items()})
    if sources:
        gc.collect()  # what capture has left in cycles would be in memory beside the weights
        with place.together("reading the weights"):
            shares = read_shards(model, sources, layouts, place.rank, to)
        assign_shards(model, shares)
        del shares  # else the first cast would have them twice
    broadcast_parameters(model, place, sources)
    shard_parameters(model, layouts, place.rank, to, sources)
    seed = place.gathered(torch.initial_seed() % (1 << 62))[0]
    agreement = Agreement(place, type(model).__name__, timeout, debug, shared_memory, broadcast_inputs)
    fabric = ProcessContext(place, seed, agreement.missing, timeout, shared_memory, symmetric_memory, device_of(model))
    runtime: Runtime
    if division.is_whole:
        runtime = GraphRuntime(model, division.parts[0].programs, agreement, fabric)
    else:
        runtime = PartitionedRuntime(division, agreement, seed, fabric)
    for part in division.parts:
        part.calls.clear()  # they hold values of the example
        part.programs.runs_python = not strict
    runtime.attach()
    runtime.surround()
    return model


def _destination(model: nn.Module, place: Mesh, device: torch.device | str | None) -> torch.device | None:
    """Where the shares go; None if they stay where the model is."""
    if device is not None:
        to = torch.device(device)
        indexed = to.type == "cuda" and to.index is None
        return torch.device("cuda", torch.cuda.current_device()) if indexed else to
    if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return None
    backends = dist.get_backend_config(place.group) if place.group is not None else "nccl"
    if torch.cuda.is_available() and "nccl" in backends:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _on(device: torch.device | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Example inputs on the device that the model goes to."""
    if device is None:
        return args, kwargs
    moved: tuple[Any, dict[str, Any]] = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
    return moved


def _division(
    model: nn.Module, place: Mesh, args: tuple[Any, ...], kwargs: Mapping[str, Any], plan: Plan | None, loads: bool
) -> Partition:
    """The model's parts, the same on every rank; where it must run to find them, it runs with rank 0's weights."""
    weight_layouts = plan.weight_layouts if plan is not None else None
    division, failed = None, None
    with place.together("rewriting the model"):
        if plan is not None:
            plan.check(model, place.tp)
        try:
            division = partition_model(model, place.tp, args, kwargs, weight_layouts, in_parts=False)
        except CaptureError as error:
            failed = error
    everywhere = not any(place.gathered(failed is None))
    with place.together("rewriting the model"):
        if failed is not None and not everywhere:
            raise failed
    if failed is None:
        assert division is not None
        with place.together("rewriting the model"):
            _refuse_constants(division)
        return division
    with place.together("capturing the model in parts"):
        if loads:
            raise CaptureError(
                f"{failed}\nautotp would capture it in parts, but must run it once with its weights for that, and they "
                "are yet to be read: load the dense model, and parallelize it without weights=",
                place=failed.place,
                reason=failed.reason,
            ) from failed
    broadcast_parameters(model, place)
    with place.together("capturing the model in parts"):
        return partition_into_modules(model, place.tp, args, kwargs, failed, weight_layouts)


def _refuse_constants(division: Partition) -> None:
    """Raise if a graph has a tensor without values."""
    for program in (p.programs.last for p in division.parts):
        for constant in program.captured.constants.values() if program is not None else ():
            if constant.is_meta:
                raise AutoTPError(
                    f"{type(division.model).__name__} holds a tensor of shape {tuple(constant.shape)} that is neither "
                    "parameter nor buffer, and on the meta device: make the model under autotp.empty_weights(), which "
                    "leaves such tensors what they are, in place of torch.device('meta')"
                )
