"""capture: turn one call of a module into a functional fx graph with dynamic batch and sequence sizes."""

from __future__ import annotations

import contextlib
import copy
import io
import linecache
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.utils import stateless
from torch.utils._sympy.printers import PythonPrinter

from autotp.arguments.arguments import Arguments
from autotp.arguments.effects import Effects
from autotp.arguments.module_state import ModuleStateTracker
from autotp.arguments.mutations import InputMutation, StateMutation
from autotp.arguments.object_tree import Slot
from autotp.arguments.snapshot import Snapshot
from autotp.capture.captured_graph import CapturedGraph, DenseShapes
from autotp.capture.export import trace
from autotp.capture.outputs import OutputSpec
from autotp.capture.side_effects import (
    computed_state,
    refuse_statistics,
    refuse_views,
    state_mutation,
    trace_again,
    written_inputs,
)
from autotp.errors import CaptureError
from autotp.modules.device import device_of
from autotp.modules.forward_patching import as_dense
from autotp.modules.hooks import refuse_hooks
from autotp.modules.names import tied_names
from autotp.utils.graph_hash import graph_hash
from passes import Layout, canonicalize, differentiable, functionalize, inline, simplify
from passes.graphs import is_random, is_tensor, op_name, where

__all__ = ["capture"]


def _stand_ins(model: nn.Module, dense: DenseShapes, device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of the dense shapes that replace all parameters and buffers; those for parameters take no memory."""
    stand_ins: dict[int, torch.Tensor] = {}

    def stand_in(t: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if id(t) not in stand_ins:
            if isinstance(t, nn.Parameter):
                empty = torch.empty((1,) * len(shape), dtype=t.dtype, device=device).expand(shape)
                requires_grad = t.is_floating_point() or t.is_complex()  # a frozen parameter may be trained later
                stand_ins[id(t)] = nn.Parameter(empty, requires_grad)
            else:  # a buffer may be mutated while it is traced, so it has storage of its own
                stand_ins[id(t)] = torch.empty(shape, dtype=t.dtype, device=device)
        return stand_ins[id(t)]

    parameters = {n: stand_in(p, dense.shapes[n]) for n, p in model.named_parameters(remove_duplicate=False)}
    return parameters | {n: stand_in(b, b.shape) for n, b in model.named_buffers(remove_duplicate=False)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's export machinery, whose log lines say nothing to a user of autotp."""
    loggers = [logging.getLogger(n) for n in ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export")]
    levels, cached_files = [logger.level for logger in loggers], set(linecache.cache)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        new_files = [f for f, e in linecache.cache.items() if f not in cached_files and len(e) > 1 and e[1]]
        for file in new_files:
            del linecache.cache[file]  # a traceback reads the text of all of its files of torch, several MB


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dense: DenseShapes | None = None,
    *,
    effects: Effects | None = None,
    slots: Mapping[str, Layout] | None = None,
) -> CapturedGraph | InputMutation | StateMutation:
    """Capture one call of a model as a functional fx graph.

    No weight is read: stand-ins of the dense shapes replace the weights while torch.export traces. So the model may be
    on the meta device, or already sharded.

    Args:
        model: the model, which is left unchanged.
        args: positional inputs. Tensor dims longer than one stay dynamic where the model allows it.
        kwargs: keyword inputs.
        dense: the dense shapes, if the parameters no longer have them.
        effects: the known effects of the model's calls; tracked module state is passed in objects in ``kwargs``.
        slots: the known layouts of sharded state, by slot. The weights determine the size of a split dim (heads), so
            that it is a constant.

    Returns:
        The graph; or a mutation that ``effects`` does not have yet, with which the call has to be captured again.

    Raises:
        CaptureError: the model's Python depends on the values of tensors, or changes a weight.
    """
    effects = effects or Effects(ModuleStateTracker(model))
    arguments = Arguments(args, kwargs, effects.counters)
    refuse_hooks(model)
    call = _trace_call(model, arguments, dense or DenseShapes.of(model), effects, slots or {})
    if not isinstance(call, _TracedCall):
        return call
    if refills := call.outputs.refills:
        names = ", ".join(sorted(map(repr, refills)))
        message = f"forward puts other tensors into containers among its arguments ({names})"
        return InputMutation(message, frozenset(refills))
    tied = tied_names(model)
    captured = call.flat_graph(tied)
    steps = _steps(captured.graph)
    remaining = _prepare(captured)
    if call.second_call is not None:
        second = call.second_call.flat_graph(tied)
        _prepare(second)
        if graph_hash(second.graph, second.constants) != graph_hash(captured.graph, captured.constants):
            return state_mutation(call.outputs.module_mutations)
    refuse_statistics(captured.graph)
    refuse_views(captured)
    spec, leaves = arguments.spec, arguments.leaves
    if remaining:
        keys = [key for key, x in zip(spec.keys(), leaves, strict=True) if isinstance(x, torch.Tensor)]
        mutation = written_inputs(captured, remaining, keys, call.snapshot)
        if mutation is not None:
            return mutation
        captured = _decompose_mutations(call, tied, remaining)
    captured.inputs = [n for n, x in zip(spec.paths(), leaves, strict=True) if isinstance(x, torch.Tensor)]
    captured.steps = steps
    return captured


@dataclass
class _TracedCall:
    """A call as torch.export traced it.

    Attributes:
        exported: torch's exported program.
        outputs: how to rebuild outputs and mutations from the program's results.
        slots: the slots of the input tensors that are in objects, by position.
        snapshot: the state of the modules before the call.
        second_call: the trace of a second call, made after the first one changed attributes of the modules.
    """

    exported: Any
    outputs: OutputSpec
    slots: dict[int, Slot]
    snapshot: Snapshot
    second_call: _TracedCall | None = None

    def flat_graph(self, tied: Mapping[str, str]) -> CapturedGraph:
        """The graph with weights as ``get_attr`` nodes, before any pass."""
        return _flat_graph(self.exported, self.outputs, tied, self.slots)


def _trace_call(
    model: nn.Module, arguments: Arguments, dense: DenseShapes, effects: Effects, layouts: Mapping[str, Layout]
) -> _TracedCall | StateMutation:
    """Trace a call with stand-ins for all weights, and trace it again if it changed attributes of the modules."""
    device, state, slots = device_of(model), effects.state, arguments.slots()
    input_layouts = {i: layouts.get(s.path) for i, s in slots.items() if s.sharded and effects.keeps_shards}
    static_dims = {(i, d) for i, layout in input_layouts.items() if layout is not None for d, _ in layout.shards}
    inputs = [_input(x, device) for x in arguments.tensors]
    # identity hooks, so that those of a checkpoint around this call do not apply
    own_hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)

    def run() -> tuple[Any, OutputSpec]:
        return trace(model, arguments.leaves, arguments.spec, inputs, state, static_dims)

    with as_dense(model), _quiet(), torch.enable_grad(), own_hooks:
        stand_ins = _stand_ins(model, dense, device)
        # stack_weights restores in reverse order: a module under two names is swapped twice
        with stateless._reparametrize_module(model, stand_ins, stack_weights=True):
            snapshot = Snapshot(model)
            tracked = {id(x) for x in state.tensors().values()}
            # an op that depends on no input is not traced: it writes into these tensors while tracing
            snapshot.copy_values(t for t in snapshot.plain_tensors() if id(t) not in tracked)
            try:
                exported, outputs = run()
                snapshot.restore()  # torch leaves copies of lists and dicts
                second = computed_state(snapshot) or trace_again(outputs, run)
            finally:
                snapshot.restore(values=True)
    if isinstance(second, StateMutation):
        return second
    if any(_is_functorch(node) for node in exported.graph.nodes):  # torch.vmap, which decomposing resolves
        with _quiet():
            exported = exported.run_decompositions({})
    if not effects.keeps_shards:
        slots, outputs.slots = (
            {n: replace(s, sharded=False) for n, s in by_position.items()} for by_position in (slots, outputs.slots)
        )
    second_call = _TracedCall(second[0], second[1], slots, snapshot) if second is not None else None
    return _TracedCall(exported, outputs, slots, snapshot, second_call)


def _input(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An input tensor for the trace: a leaf of the autograd graph, not on the meta device."""
    plain = x.detach().to(device) if x.device.type == "meta" else x.detach()
    return plain.requires_grad_(x.requires_grad) if plain.is_floating_point() else plain


def _decompose_mutations(call: _TracedCall, tied: Mapping[str, str], remaining: list[fx.Node]) -> CapturedGraph:
    """The graph of a call whose in-place ops torch has decomposed.

    Args:
        call: the traced call.
        tied: the first name of each tied weight.
        remaining: the nodes whose mutations autotp's passes could not make functional.

    Raises:
        CaptureError: torch cannot make them functional either.
    """
    if unrecorded := [n for n in remaining if n.meta.get("unrecorded")]:
        raise CaptureError(
            f"{where(unrecorded[0])} changes a value in place that gradients pass by (no_grad, detach), or that "
            "shares memory in a way that torch does not declare: no functional graph can express the result",
            reason="a value changed in place whose other readers no graph can express",
        )
    try:
        with _quiet():
            exported = call.exported.run_decompositions({})
            captured = replace(call, exported=exported).flat_graph(tied)
    except RuntimeError as error:
        message = str(error).split("\n")[0]
        raise CaptureError(f"{where(remaining[0])} changes a tensor in place: {message}", reason=message) from error
    if remaining := _prepare(captured):
        raise CaptureError(f"{where(remaining[0])} changes a tensor in place in a way that cannot be made functional")
    return captured


def _steps(graph: fx.Graph) -> tuple[Any, ...]:
    """The ops of a traced graph that compute tensors, with the tensors' sizes in the traced call."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and is_tensor(n)]
    return tuple(
        (op_name(n), tuple(s if isinstance(s, int) else s.node.hint for s in n.meta["val"].shape)) for n in nodes
    )


def _is_functorch(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def _prepare(captured: CapturedGraph) -> list[fx.Node]:
    """Make a graph functional and plain; returns the nodes whose mutations could not be made functional."""
    inline(captured.graph)
    remaining = functionalize(captured.graph)
    module = captured.graph.owning_module
    for node in captured.graph.nodes:
        if node.op == "get_attr" and not is_tensor(node):
            captured.regions[str(node.target)] = node.meta["region"] = getattr(module, str(node.target))
    for node in captured.graph.nodes:
        regions = [captured.regions[str(n.target)] for n in node.all_input_nodes if str(n.target) in captured.regions]
        node.meta["random"] = any(is_random(n) for r in regions for n in getattr(r, "graph", fx.Graph()).nodes)
    results = captured.graph.output_node().args[0]
    written_back = {number: results[i] for i, number in captured.outputs.written.items()}
    for number, node in enumerate(captured.graph.find_nodes(op="placeholder")):
        if "held" in node.meta:  # a tensor in an object, of which the trace made a copy that may be changed in place
            for clone in [u for u in node.users if op_name(u) == "aten.clone"]:
                unchanged = written_back.get(number, clone) is clone
                if "slot" in node.meta or unchanged or _is_only_overwritten(clone):
                    clone.replace_all_uses_with(node)
    captured.graph.owning_module = None  # its get_attr nodes now name the model's own parameters
    differentiable(captured.graph, captured.parameters)
    if any(op_name(n) == "aten.detach" and n.args[0].meta.get("grad") for n in captured.graph.nodes):
        for node in remaining:  # torch's decomposition would let the mutation through where gradients stop
            node.meta["unrecorded"] = True
    while simplify(captured.graph):
        pass
    canonicalize(captured.graph, captured.constants)
    differentiable(captured.graph, captured.parameters)
    return remaining


_OVERWRITING = {"aten.index_put", "aten.index_copy", "aten.slice_scatter", "aten.select_scatter", "aten.copy"}


def _is_only_overwritten(clone: fx.Node) -> bool:
    """Whether the only user of a copy overwrites it, and its backward does not read it.

    Otherwise the copy has to stay: it keeps the old value when the new one is written back into the original.
    """
    user = next(iter(clone.users))
    return len(clone.users) == 1 and op_name(user) in _OVERWRITING and user.args.index(clone) == 0


def _size_guards(graph: fx.Graph, dims: Mapping[str, tuple[int, int]]) -> list[tuple[Any, tuple[tuple[int, int], ...]]]:
    """The conditions on input sizes under which a captured graph is valid.

    Args:
        graph: the exported graph.
        dims: the ``(input, dim)`` of each symbolic size.

    Returns:
        For each condition a function of sizes, and the ``(input, dim)`` of each of its arguments.
    """
    symbolic = [s for n in graph.nodes if is_tensor(n) for s in n.meta["val"].shape if isinstance(s, torch.SymInt)]
    if not symbolic:
        return []
    guards = {}
    for guard in symbolic[0].node.shape_env.guards:
        names = sorted(str(x) for x in guard.expr.free_symbols)
        if names and all(n in dims for n in names):
            text = PythonPrinter().doprint(guard.expr)
            guards[text] = (eval(f"lambda {', '.join(names)}: {text}", {"math": math}), tuple(dims[n] for n in names))
    return list(guards.values())


def _name_in_model(name: str) -> str:
    return name.removeprefix("model.") if name != "model" else ""


def _flat_graph(exported: Any, outputs: OutputSpec, tied: Mapping[str, str], slots: dict[int, Slot]) -> CapturedGraph:
    """The exported graph with weights as ``get_attr`` nodes, under their names in the user's model."""
    signature = exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"forward changes {spec.kind.name.removesuffix('_MUTATION').lower().replace('_', ' ')} "
                f"{_name_in_model(spec.target or '')!r} in place; a graph is a function of weights and inputs only"
            )
    graph: fx.Graph = copy.deepcopy(exported.graph_module.graph)  # the exported program may still be decomposed
    graph.owning_module = exported.graph_module
    captured = CapturedGraph(graph, {}, {}, set(), outputs, slots)
    input_specs = {spec.arg.name: spec for spec in signature.input_specs}
    dims: dict[str, tuple[int, int]] = {}
    attributes: dict[str, fx.Node] = {}
    position = 0
    for node in list(graph.nodes):
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = {
                k: (_name_in_model(p), c) for k, (p, c) in node.meta["nn_module_stack"].items() if p
            }
        if node.op != "placeholder":
            continue
        spec = input_specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            for d, size in enumerate(node.meta["val"].shape):
                if isinstance(size, int) or size.node.expr.is_number:  # a symbol may become a constant in the trace
                    captured.static.append((position, d, int(size)))
                elif (first := dims.setdefault(str(size), (position, d))) != (position, d):
                    captured.equal.append((*first, position, d))
            if (slot := slots.get(position)) is not None:
                node.meta |= {"held": True, **({"slot": slot.path} if slot.sharded else {})}
            position += 1
            continue
        target = tied.get(_name_in_model(spec.target), _name_in_model(spec.target))
        if spec.kind is InputKind.PARAMETER:
            captured.parameters.add(target)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            target = f"_constant_{len(captured.constants)}"
            captured.constants[target] = exported.constants[spec.target]
        if node.users:
            if target not in attributes:
                with graph.inserting_before(node):
                    attributes[target] = graph.create_node("get_attr", target)
                attributes[target].meta = dict(node.meta)
            node.replace_all_uses_with(attributes[target])
        graph.erase_node(node)
    captured.guards = _size_guards(graph, dims)
    graph.output_node().meta["slots"] = {n: slot.path for n, slot in outputs.slots.items() if slot.sharded}
    assert all(is_tensor(n) for n in graph.nodes if n.op == "placeholder")
    return captured
