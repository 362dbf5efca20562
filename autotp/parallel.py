"""parallelize: a dense model becomes this rank's part of a tensor-parallel one, in place."""

from __future__ import annotations

import gc
from collections.abc import Mapping
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
from autotp.distributed.mesh import Mesh, join
from autotp.distributed.process_context import ProcessContext
from autotp.errors import AutoTPError, WeightsError
from autotp.integrations import integrate
from autotp.modules.device import computing_on, device_of
from autotp.modules.model_checks import check_model
from autotp.options import TIMEOUT, Options
from autotp.partition.partition import Partition, cannot_run, partition_into_modules, partition_model
from autotp.partition.partitioned_runtime import PartitionedRuntime
from autotp.plans.make_plan import announce, plan_of
from autotp.plans.plan import Plan
from autotp.runtime.graph_runtime import GraphRuntime
from autotp.runtime.runtime import Runtime
from autotp.saving.replicas import announce_model
from autotp.weights.checkpoint import Source, open_checkpoint
from autotp.weights.data_parallel import refuse_wrapped
from autotp.weights.load_checkpoint import first_elements, match_checkpoint, read_shards, refuse_empty
from autotp.weights.shard_parameters import assign_shards, broadcast_parameters, shard_parameters
from passes import Lowering

__all__ = ["parallelize"]


def _structure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in which ranks must agree: the model's class, weights and mode, and the inputs' structure."""
    arguments = Arguments(args, kwargs)
    entries: dict[str, Any] = {"model": f"{type(model).__module__}.{type(model).__qualname__}"}
    entries |= {f"training of {n or 'the model'}": m.training for n, m in model.named_modules()}
    named = [("parameter", model.named_parameters()), ("buffer", model.named_buffers())]
    for kind, tensors in named:
        entries |= {f"{kind} {n}": f"{tuple(t.shape)} {t.dtype}" for n, t in tensors}
    entries["structure of the inputs"] = str(arguments.spec)
    for i, leaf in enumerate(arguments.leaves):
        entries[f"input {i}"] = f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else repr(leaf)
    return entries


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
        weights: a checkpoint, of which each rank reads its shards only. It replaces the present values of parameters
            and persistent buffers, which may be on the meta device (:func:`autotp.empty_weights`). It is a
            ``.safetensors`` file, a state dict that ``torch.save`` wrote, a folder in which transformers saves a
            model (files and index) or torch.distributed.checkpoint a training state, or a mapping from names to
            tensors or to objects with a shape, a dtype and slicing. Loading is as strict as ``load_state_dict``, but
            of tied weights one name suffices. The dtype is the model's.
        device: the device of the shards. By default they stay on the model's device; from the meta device they go to
            this process's GPU if the group's backend has one, else to the CPU.
        example_inputs: a tuple of positional or a dict of keyword inputs to capture the model with;
            batch and sequence stay dynamic. Left out, a transformers model's ``dummy_inputs`` are
            taken, or inputs that the first layers suggest.
        mesh: a one-dimensional DeviceMesh, or a process group, of ``tp`` ranks.
        backend: the backend to start a process group with, if there is none; ``nccl`` where CUDA is,
            ``gloo`` else.
        plan: a plan from :func:`autotp.plan` to follow.
        timeout: how long a rank waits for the others, at the start of each call and in groups of processes
            that are started here; then it raises, and names the ranks that did not come.
        debug: let the ranks compare the values of each call's inputs, and of unsplit parameters, beside the call's
            structure. Every rank reads all of them at each call.
        strict: make warnings errors. These are weights, 1% of the parameters or more, that have too few pieces for so
            many ranks and stay unsplit; and a model, or a later call, that is captured in parts.
        check: run a rewritten graph only if it is proved to compute, on every rank, what the dense model does,
            values and every gradient (:func:`passes.check`). The proof takes a few percent of the time of rewriting.
            ``"warn"`` runs an unproved one with an UnprovedWarning, False proves nothing.
        shared_memory: on CPUs, let ranks that share a host exchange values through memory that they map, which takes
            microseconds where gloo takes half a millisecond; False leaves all to the process group.
        symmetric_memory: on GPUs of one host that NVLink joins, sum small tensors (half a MiB; a quarter for more than
            4 ranks) by the one-shot kernel of torch's symmetric memory, where a trial shows that it works. The kernel
            has no ``timeout``: if a rank dies within a call, only the launcher can end the others.
        broadcast_inputs: take rank 0's inputs on all ranks where the inputs of a call, or of ``generate``, differ; by
            default that is an error on all ranks. Calls compare the values of integer inputs on the CPU (token ids,
            masks), and with ``debug`` of all inputs; ``generate`` always compares all.
        lowering: which passes make the rewritten graphs faster before they run (:class:`autotp.Lowering`); True: all;
            False: none, the graphs run as ``autotp.graph`` prints them.
        exact: leave out the lowering passes that call other kernels than the model does, and so round differently.
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

    Afterwards calls, ``generate``, ``full_state_dict``, ``full_gradients``, ``parameters_norm`` and
    ``clip_grad_norm_`` are compared among the ranks before they start: a MismatchError on all of them says what
    differs. In ``generate`` all ranks draw rank 0's random numbers.

    Example:
        >>> model = autotp.parallelize(model, tp=4)  # under torchrun --nproc-per-node 4
        >>> model(input_ids=ids).logits
    """
    if check not in (True, False, "warn"):
        raise ValueError(f'check is True, False or "warn", not {check!r}')
    if "_autotp" in model.__dict__:
        raise AutoTPError(f"this {type(model).__name__} is parallelized already")
    passes = lowering if isinstance(lowering, Lowering) else Lowering() if lowering else Lowering.none()
    compiled = {"mode": compile} if isinstance(compile, str) else dict(compile) if isinstance(compile, Mapping) else {}
    options = Options(
        timeout, debug, strict, check, shared_memory, symmetric_memory, broadcast_inputs,
        passes.exactly() if exact else passes, compiled if compile else None,
    )  # fmt: skip
    with torch.inference_mode(False):  # else the shards would be tensors that never train
        return _parallelize(model, join(tp, mesh, backend, timeout), weights, device, example_inputs, plan, options)


def _parallelize(
    model: nn.Module, mesh: Mesh, weights: Source | None, device: torch.device | str | None,
    example_inputs: ExampleInputs, plan: Plan | None, options: Options,
) -> nn.Module:  # fmt: skip
    with mesh.together("finding example inputs"):
        refuse_empty(model, weights is not None)
        check_model(model)
        refuse_wrapped(model, mesh.tp)
        to = _destination(model, mesh, device)
        with computing_on(to):
            args, kwargs = _on(to, *example_call(model, example_inputs))
    with mesh.together("looking at the weights", WeightsError):
        tensors = open_checkpoint(weights) if weights is not None else {}
        sources = match_checkpoint(model, tensors) if weights is not None else {}
        first = first_elements(sources)
    described = {f"{name} in the weights": f"{t.shape} {t.dtype}" for name, t in tensors.items()}
    described |= {f"first elements of {name} in the weights": f"{n:x}" for name, n in first.items()}
    mesh.agree(options.described() | described | _structure(model, args, kwargs))
    with computing_on(to):
        partition = _partition(model, mesh, args, kwargs, plan, weights is not None)
    with mesh.together("proving the graphs"):
        for part in partition.parts:
            part.cache.options = options
            part.cache.prove()
    with mesh.together("looking at what stays unsplit"):
        announce(plan_of(partition, mesh.tp), partition, options.strict, stacklevel=4)
    layouts = partition.weight_layouts
    mesh.agree({"parts": [p.path for p in partition.parts]} | {f"layout of {n}": str(x) for n, x in layouts.items()})
    if sources:
        gc.collect()  # what capture has left in cycles would be in memory beside the weights
        with mesh.together("reading the weights", WeightsError):
            shards = read_shards(model, sources, layouts, mesh.rank, to)
        assign_shards(model, shards)
        del shards  # else the first cast would have them twice
    broadcast_parameters(model, mesh, sources)
    shard_parameters(model, layouts, mesh.rank, to, sources)
    _attach(partition, mesh, options)
    return model


def _attach(partition: Partition, mesh: Mesh, options: Options) -> None:
    """Let the model, whose parameters are this rank's shards, run its graphs."""
    model = partition.model
    seed = mesh.gathered(torch.initial_seed() % (1 << 62))[0]
    agreement = Agreement(mesh, type(model).__name__, options)
    context = ProcessContext(mesh, seed, agreement.missing, options, device_of(model))
    runtime: Runtime
    if partition.is_whole:
        runtime = GraphRuntime(model, partition.parts[0].cache, agreement, context)
    else:
        runtime = PartitionedRuntime(partition, agreement, context)
    for part in partition.parts:
        part.calls.clear()  # they hold values of the example
    runtime.attach()
    integrate(runtime)
    announce_model(runtime)


def _destination(model: nn.Module, mesh: Mesh, device: torch.device | str | None) -> torch.device | None:
    """The device that the shards go to; None: the one that the model is on."""
    if device is not None:
        to = torch.device(device)
        indexed = to.type == "cuda" and to.index is None
        return torch.device("cuda", torch.cuda.current_device()) if indexed else to
    if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return None
    backends = dist.get_backend_config(mesh.group) if mesh.group is not None else "nccl"
    if torch.cuda.is_available() and "nccl" in backends:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _on(device: torch.device | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Example inputs on the device that the model goes to."""
    if device is None:
        return args, kwargs
    moved: tuple[Any, dict[str, Any]] = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
    return moved


def _partition(
    model: nn.Module, mesh: Mesh, args: tuple[Any, ...], kwargs: Mapping[str, Any], plan: Plan | None, loads: bool
) -> Partition:
    """The model's parts, the same on every rank. A model that must run for that runs with rank 0's weights."""
    layouts = plan.weight_layouts if plan is not None else None

    def whole() -> Partition:
        if plan is not None:
            plan.check(model, mesh.tp)
        return partition_model(model, mesh.tp, args, kwargs, layouts, in_parts=False)

    partition, failed = mesh.attempt("rewriting the model", whole)
    if partition is not None:
        with mesh.together("rewriting the model"):
            _refuse_constants(partition)
        return partition
    assert failed is not None
    with mesh.together("capturing the model in parts"):
        if loads:
            obstacle = "its weights are yet to be read: load the dense model, and parallelize it without weights="
            raise cannot_run(failed, obstacle) from failed
    broadcast_parameters(model, mesh)
    with mesh.together("capturing the model in parts"):
        return partition_into_modules(model, mesh.tp, args, kwargs, failed, layouts)


def _refuse_constants(partition: Partition) -> None:
    """Raise if a graph holds a tensor without values."""
    for program in (p.cache.last for p in partition.parts):
        for constant in program.captured.constants.values() if program is not None else ():
            if constant.is_meta:
                raise AutoTPError(
                    f"{type(partition.model).__name__} holds a tensor of shape {tuple(constant.shape)} that is neither "
                    "parameter nor buffer, and on the meta device: make the model under autotp.empty_weights(), which "
                    "leaves such tensors what they are, in place of torch.device('meta')"
                )
