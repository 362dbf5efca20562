"""capture: a module and example inputs become one functional fx graph, batch and sequence dynamic."""

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
from autotp.arguments.snapshot import Snapshot, Values
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
    """Tensors of the dense shapes in place of all parameters and buffers; parameters' take no memory."""
    made: dict[int, torch.Tensor] = {}

    def stand_in(t: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if id(t) not in made:
            if isinstance(t, nn.Parameter):
                empty = torch.empty((1,) * len(shape), dtype=t.dtype, device=device).expand(shape)
                made[id(t)] = nn.Parameter(empty, t.is_floating_point() or t.is_complex())  # or so it may be later
            else:  # a buffer may be written to while tracing, so it has storage of its own
                made[id(t)] = torch.empty(shape, dtype=t.dtype, device=device)
        return made[id(t)]

    found = {n: stand_in(p, dense.shapes[n]) for n, p in model.named_parameters(remove_duplicate=False)}
    return found | {n: stand_in(b, b.shape) for n, b in model.named_buffers(remove_duplicate=False)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the export machinery's own log lines, which say nothing to a user of autotp."""
    loggers = [logging.getLogger(n) for n in ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export")]
    levels, read = [x.level for x in loggers], set(linecache.cache)
    for x in loggers:
        x.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)
        for file in [f for f, entry in linecache.cache.items() if f not in read and len(entry) > 1 and entry[1]]:
            del linecache.cache[file]  # the text of all of torch's files that are in a traceback, some MB


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

    No weight is read: stand-ins of the dense shapes take their places while torch.export traces, so the
    model may be on the meta device, or already split.

    Args:
        model: the model. It is left as it was.
        args: positional inputs. Tensor dims longer than one stay dynamic where the model allows it.
        kwargs: keyword inputs.
        dense: the dense shapes, where the parameters no longer have them.
        effects: what calls of the model are known to mutate; state that it keeps is in objects among ``kwargs``.
        slots: the layouts of what ranks keep shards of, as far as they are known: a dim that is split (heads) is as
            long as the weights make it, and so a constant.

    Returns:
        The graph; or a mutation that ``effects`` does not have yet: the call is to be captured again with it.

    Raises:
        CaptureError: the model's Python depends on the values of tensors, or changes a weight.
    """
    effects = effects or Effects(ModuleStateTracker(model))
    arguments = Arguments(args, kwargs, effects.counters)
    refuse_hooks(model)
    traced = _traced(model, arguments, dense or DenseShapes.of(model), effects, slots or {})
    if not isinstance(traced, _Traced):
        return traced
    if refills := traced.outputs.refills:
        names = ", ".join(sorted(map(repr, refills)))
        return InputMutation(
            f"forward puts other tensors into arguments that it is given ({names})", frozenset(refills)
        )
    tied = tied_names(model)
    captured = traced.graph(tied)
    steps = _steps(captured.graph)
    left = _prepare(captured)
    if traced.again is not None:
        other = traced.again.graph(tied)
        _prepare(other)
        if graph_hash(other.graph, other.constants) != graph_hash(captured.graph, captured.constants):
            return state_mutation(traced.outputs.module_mutations)
    refuse_statistics(captured.graph)
    refuse_views(captured)
    spec, leaves = arguments.spec, arguments.leaves
    if left:
        keys = [key for key, x in zip(spec.keys(), leaves, strict=True) if isinstance(x, torch.Tensor)]
        mutation = written_inputs(captured, left, keys, traced.snapshot)
        if mutation is not None:
            return mutation
        captured = _functional(traced, tied, left)
    captured.inputs = [n for n, x in zip(spec.paths(), leaves, strict=True) if isinstance(x, torch.Tensor)]
    captured.steps = steps
    return captured


@dataclass
class _Traced:
    """A call as torch.export traced it.

    Attributes:
        exported: torch's exported program.
        outputs: how outputs and mutations are made of its results.
        slots: the slots of inputs that are in objects, by position.
        snapshot: the state of the modules before the call.
        again: the trace of a second call, which finds what the first one left on the modules.
    """

    exported: Any
    outputs: OutputSpec
    slots: dict[int, Slot]
    snapshot: Snapshot
    again: _Traced | None = None

    def graph(self, tied: Mapping[str, str]) -> CapturedGraph:
        """The flat graph."""
        return _flat_graph(self.exported, self.outputs, tied, self.slots)


def _traced(
    model: nn.Module, arguments: Arguments, dense: DenseShapes, effects: Effects, layouts: Mapping[str, Layout]
) -> _Traced | StateMutation:
    """Trace a call with stand-ins for all weights, and once more where it leaves something on the modules."""
    device, state, slots = device_of(model), effects.state, arguments.slots()
    split = {i: layouts.get(s.path) for i, s in slots.items() if s.sharded and effects.keeps_shards}
    fixed = {(i, d) for i, layout in split.items() if layout is not None for d, _ in layout.shards}
    inputs = [_input(x, device) for x in arguments.tensors]
    as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)  # not a checkpoint's around us

    def run() -> tuple[Any, OutputSpec]:
        return trace(model, arguments.leaves, arguments.spec, inputs, state, fixed)

    with as_dense(model), _quiet(), torch.enable_grad(), as_it_is:
        stand_ins = _stand_ins(model, dense, device)
        # in reverse order: a module under two names is swapped twice
        with stateless._reparametrize_module(model, stand_ins, stack_weights=True):
            snapshot = Snapshot(model)
            known = {id(x) for x in state.tensors().values()}
            values = Values(
                [t for t in snapshot.plain_tensors() if id(t) not in known]
            )  # what meets no input is not traced
            try:
                exported, outputs = run()
                snapshot.restore()  # torch leaves copies of lists and dicts
                again = computed_state(values.written(), snapshot) or trace_again(outputs, run)
            finally:
                snapshot.restore()
                values.restore()
    if isinstance(again, StateMutation):
        return again
    if any(_is_of_functorch(node) for node in exported.graph.nodes):  # torch.vmap, which tracing again resolves
        with _quiet():
            exported = exported.run_decompositions({})
    if not effects.keeps_shards:
        slots, outputs.slots = (
            {n: replace(s, sharded=False) for n, s in each.items()} for each in (slots, outputs.slots)
        )
    second = _Traced(again[0], again[1], slots, snapshot) if again is not None else None
    return _Traced(exported, outputs, slots, snapshot, second)


def _input(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An input tensor for the trace: a leaf of the autograd graph, not on the meta device."""
    plain = x.detach().to(device) if x.device.type == "meta" else x.detach()
    return plain.requires_grad_(x.requires_grad) if plain.is_floating_point() else plain


def _functional(traced: _Traced, tied: Mapping[str, str], left: list[fx.Node]) -> CapturedGraph:
    """The graph with in-place ops decomposed by torch, where the nodes ``left`` could not be made functional here.

    Raises:
        CaptureError: torch cannot either.
    """
    if unrecorded := [n for n in left if n.meta.get("unrecorded")]:
        raise CaptureError(
            f"{where(unrecorded[0])} changes a value in place that gradients pass by (no_grad, detach), or that "
            "shares memory in a way that torch does not declare: no functional graph says what then happens",
            reason="a value changed in place that others see in ways no graph can say",
        )
    try:
        with _quiet():
            exported = traced.exported.run_decompositions({})
            captured = replace(traced, exported=exported).graph(tied)
    except RuntimeError as error:
        first_line = str(error).split("\n")[0]
        raise CaptureError(f"{where(left[0])} changes a tensor in place: {first_line}", reason=first_line) from error
    if left := _prepare(captured):
        raise CaptureError(f"{where(left[0])} changes a tensor in place in a way that cannot be made functional")
    return captured


def _steps(graph: fx.Graph) -> tuple[Any, ...]:
    """What a traced graph calls that gives tensors, and their sizes in the call that was traced."""
    made = [n for n in graph.nodes if n.op == "call_function" and is_tensor(n)]
    return tuple(
        (op_name(n), tuple(s if isinstance(s, int) else s.node.hint for s in n.meta["val"].shape)) for n in made
    )


def _is_of_functorch(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def _prepare(captured: CapturedGraph) -> list[fx.Node]:
    """Make a graph functional and plain; the nodes for which that did not succeed."""
    inline(captured.graph)
    left = functionalize(captured.graph)
    module = captured.graph.owning_module
    for node in captured.graph.nodes:
        if node.op == "get_attr" and not is_tensor(node):
            captured.regions[str(node.target)] = node.meta["region"] = getattr(module, str(node.target))
    for node in captured.graph.nodes:
        regions = [captured.regions[str(n.target)] for n in node.all_input_nodes if str(n.target) in captured.regions]
        node.meta["random"] = any(is_random(n) for r in regions for n in getattr(r, "graph", fx.Graph()).nodes)
    results = captured.graph.output_node().args[0]
    back = {number: results[i] for i, number in captured.outputs.written.items()}
    for number, node in enumerate(captured.graph.find_nodes(op="placeholder")):
        if "held" in node.meta:  # what an object holds was copied, so that it could be changed in place
            for user in [u for u in node.users if op_name(u) == "aten.clone"]:
                if "slot" in node.meta or back.get(number, user) is user or _is_only_overwritten(user):
                    user.replace_all_uses_with(node)
    captured.graph.owning_module = None  # its get_attr nodes now name the model's own parameters
    differentiable(captured.graph, captured.parameters)
    if any(op_name(n) == "aten.detach" and n.args[0].meta.get("grad") for n in captured.graph.nodes):
        for node in left:  # tracing again would follow the change where gradients stop
            node.meta["unrecorded"] = True
    while simplify(captured.graph):
        pass
    canonicalize(captured.graph, captured.constants)
    differentiable(captured.graph, captured.parameters)
    return left


_REPLACING = {"aten.index_put", "aten.index_copy", "aten.slice_scatter", "aten.select_scatter", "aten.copy"}


def _is_only_overwritten(copied: fx.Node) -> bool:
    """Whether nothing reads a copy but what makes the new value of it, and that does not need it in a backward: else,
    where the new value goes back into what was copied, the old one must be somewhere."""
    user = next(iter(copied.users))
    return len(copied.users) == 1 and op_name(user) in _REPLACING and user.args.index(copied) == 0


def _guards(graph: fx.Graph, dims: Mapping[str, tuple[int, int]]) -> list[tuple[Any, tuple[tuple[int, int], ...]]]:
    """The conditions on input sizes under which the capture holds, as functions of those sizes."""
    symbolic = [s for n in graph.nodes if is_tensor(n) for s in n.meta["val"].shape if isinstance(s, torch.SymInt)]
    if not symbolic:
        return []
    found = {}
    for guard in symbolic[0].node.shape_env.guards:
        names = sorted(str(x) for x in guard.expr.free_symbols)
        if names and all(n in dims for n in names):
            text = PythonPrinter().doprint(guard.expr)
            found[text] = (eval(f"lambda {', '.join(names)}: {text}", {"math": math}), tuple(dims[n] for n in names))
    return list(found.values())


def _unprefixed(name: str) -> str:
    return name.removeprefix("model.") if name != "model" else ""


def _flat_graph(exported: Any, outputs: OutputSpec, tied: Mapping[str, str], slots: dict[int, Slot]) -> CapturedGraph:
    """The exported graph with parameters as ``get_attr`` nodes and names as in the user's model."""
    signature = exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"forward changes {spec.kind.name.removesuffix('_MUTATION').lower().replace('_', ' ')} "
                f"{_unprefixed(spec.target or '')!r} in place; autotp runs functions of weights and inputs only"
            )
    graph: fx.Graph = copy.deepcopy(exported.graph_module.graph)  # exported stays, to be functionalized if need be
    graph.owning_module = exported.graph_module
    captured = CapturedGraph(graph, {}, {}, set(), outputs, slots)
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    dims: dict[str, tuple[int, int]] = {}
    attributes: dict[str, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = {
                k: (_unprefixed(p), c) for k, (p, c) in node.meta["nn_module_stack"].items() if p
            }
        if node.op != "placeholder":
            continue
        spec = kinds[node.name]
        if spec.kind is InputKind.USER_INPUT:
            for d, size in enumerate(node.meta["val"].shape):
                if isinstance(size, int) or size.node.expr.is_number:  # one that became a constant while tracing
                    captured.static.append((count, d, int(size)))
                elif (first := dims.setdefault(str(size), (count, d))) != (count, d):
                    captured.equal.append((*first, count, d))
            if (slot := slots.get(count)) is not None:
                node.meta |= {"held": True, **({"slot": slot.path} if slot.sharded else {})}
            count += 1
            continue
        target = tied.get(_unprefixed(spec.target), _unprefixed(spec.target))
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
    captured.guards = _guards(graph, dims)
    graph.output_node().meta["slots"] = {n: slot.path for n, slot in outputs.slots.items() if slot.sharded}
    assert all(is_tensor(n) for n in graph.nodes if n.op == "placeholder")
    return captured
