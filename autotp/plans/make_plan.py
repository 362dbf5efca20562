"""planning: the plan of a model, read off its rewritten graphs, and what a user is told of it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from autotp.capture.example_inputs import ExampleInputs
from autotp.errors import PartialCaptureWarning, PlanError, WholeWeightWarning
from autotp.partition.partition import CapturedModule, Partition
from autotp.partition.prepare import prepare
from autotp.plans.plan import Collective, Plan, Weight, obstacles_text
from autotp.program.sharded_program import ShardedProgram
from passes import Layout, Reason, ops
from passes.graphs import op_name
from passes.ops.norms import norm_over_shards
from passes.ops.registry import COLLECTIVES
from passes.ops.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding
from passes.rules.contraction import MOVES

__all__ = ["announce", "make_plan", "plan_of"]


def _elements(value: Any) -> tuple[int, int]:
    """A (fake) tensor's number of elements at the example inputs' size, and its bytes an element."""
    if not isinstance(value, torch.Tensor):
        return 0, 0
    total = 1
    for size in value.shape:
        total *= size if isinstance(size, int) else int(size.node.hint or 1)
    return total, value.element_size()


def _needed(graph: fx.Graph, value: str) -> dict[fx.Node, bool]:
    """Whether the call that a graph was captured with needs a gradient of each node, whose tensor is in ``value``."""
    needed: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            needed[node] = getattr(node.meta[value], "requires_grad", False)
        elif node.op == "get_attr":
            needed[node] = bool(node.meta.get("grad"))
        else:
            needed[node] = bool(node.meta.get("grad")) and any(needed[n] for n in node.all_input_nodes)
    return needed


def _collectives(graph: fx.Graph, tp: int) -> list[Collective]:
    found = []
    needed = _needed(graph, "global")
    for node in graph.nodes:
        if node.target not in COLLECTIVES:
            continue
        _, forward, backward, group = COLLECTIVES[node.target]
        for kind, when in ((forward, "forward"), (backward if needed[node] else "", "backward")):
            if kind:
                size, module = _size(node, kind, tp), node.meta.get("module", "")
                found.append(Collective(kind, when, node.name, module, *size, node.args[group]))
    return found


def _size(node: fx.Node, kind: str, tp: int) -> tuple[int, int]:
    """The number of elements that an op's collective of this kind communicates, and their bytes."""
    if node.target is vocab_parallel_cross_entropy:
        rows, itemsize = _elements(node.args[1].meta["global"])[0], node.args[0].meta["global"].element_size()
        return (3 + bool(node.args[8])) * rows * tp, max(itemsize, 4)
    if node.target is norm_over_shards:
        elements, itemsize = _elements(node.meta["global"])
        return 2 * (elements // sum(node.args[4])) * (tp if kind == "all_gather" else 1), itemsize
    if node.target not in (ops.enter, ops.enter_overlapping):
        return _elements(node.meta["global"])
    total = 0
    for value in node.args[0] if isinstance(node.args[0], tuple) else (node.args[0],):
        elements, itemsize = _elements(value.meta["global"])
        layout = value.meta.get("layout")
        if value.op == "get_attr" and layout is not None and node.target is ops.enter:
            for _, s in layout.shards:
                elements = elements // s.size * max(s.counts)
        total += elements
    return total, itemsize


_STYLES = {
    **dict.fromkeys(ops.ROW_PARALLEL.values(), "row"),
    **dict.fromkeys(ops.COLUMN_PARALLEL.values(), "column"),
    vocab_parallel_embedding: "vocabulary",
}


def _style(node: fx.Node) -> str:
    """How a split weight is used: by the product, or look-up, that it reaches."""
    for user in node.users:
        if user.target in _STYLES:
            return _STYLES[user.target]
        follow = user.target in (ops.enter, ops.enter_overlapping, operator.getitem)
        if follow or op_name(user) in MOVES:
            found = _style(user)
            if found != "split":
                return found
    return "split"


def _why(weight: Layout, style: str, units: str) -> str:
    shared = [s for _, s in weight.shards if not s.disjoint]
    if style == "row":
        text = f"contracts {units}: a pending sum, reduced once"
    elif style == "vocabulary":
        text = "each rank looks up its own words, reduced once"
    elif style == "column":
        text = f"makes {units}"
    else:
        text = f"belongs to {units}"
    if shared:
        text += "; shared by ranks that need the same part, gradients summed among them"
    return text


_UNUSED = "not used in the captured call"


def _weights(rewritten: ShardedProgram, part: CapturedModule) -> Iterator[Weight]:
    """What a part's program makes of each of its weights, under the model's names."""
    nodes = {str(n.target): n for n in rewritten.graph.nodes if n.op == "get_attr"}
    parameters = dict(part.module.named_parameters())
    for name, full in part.names.items():
        shape, itemsize = tuple(part.cache.captures.dense.shapes[name]), parameters[name].element_size()
        layout = rewritten.weight_layouts.get(name)
        if layout is None or layout.whole:
            reason = rewritten.reasons.get(name) or Reason(_UNUSED if name not in nodes else "as planned")
            yield Weight(full, shape, itemsize, "whole", {}, reason.text, reason.limit)
            continue
        style = _style(nodes[name]) if name in nodes else "split"
        _, shards = layout.shards[0]
        counts = "/".join(str(c) for c in sorted(set(shards.counts), reverse=True))
        why = _why(layout, style, f"{counts} of {shards.size} indices")
        yield Weight(full, shape, itemsize, style, layout.dims, why)


def _fewest(rewritten: ShardedProgram) -> dict[str, tuple[int, int]]:
    """The fewest collectives in a forward and a backward, and their bytes at the example inputs' size."""

    def size(node: fx.Node, when: str) -> int:
        if node in rewritten.minimum.norms:  # gathered forward, summed backward
            elements, itemsize = _elements(node.meta["val"])
            rows = elements // node.meta["val"].shape[-1]
            return 2 * rows * itemsize * (rewritten.tp if when == "forward" else 1)
        if op_name(node) == "aten.cross_entropy_loss":
            rows, itemsize = _elements(node.args[1].meta["val"])[0], _elements(node.args[0].meta["val"])[1]
            smoothed = len(node.args) > 5 and bool(node.args[5])
            return (3 + smoothed) * rows * rewritten.tp * max(itemsize, 4)
        elements, itemsize = _elements(node.meta["val"])
        if node.op == "get_attr":
            for _, shards in rewritten.weight_layouts[str(node.target)].shards:
                elements = elements // shards.size * max(shards.counts)
        return elements * itemsize

    needed = _needed(rewritten.captured.graph, "val")
    backward = [n for n in rewritten.minimum.backward if needed[n]]
    both = {"forward": rewritten.minimum.forward, "backward": backward}
    return {when: (len(nodes), sum(size(n, when) for n in nodes)) for when, nodes in both.items()}


def plan_of(division: Partition, tp: int) -> Plan:
    """The plan that a model follows, whole or in parts: a part's collectives count once for each of its calls."""
    found: dict[str, Weight] = {}
    collectives, gathered = [], []
    fewest = {"forward": (0, 0), "backward": (0, 0)}
    for part in [*division.parts, *division.idle]:
        prefix = f"{part.path.replace('.', '_')}_" if part.path else ""
        for call in part.calls:
            rewritten = part.cache.bind(call.args, call.kwargs).entry.program
            for weight in _weights(rewritten, part):
                if found.get(weight.name, weight).why == _UNUSED or weight.name not in found:
                    found[weight.name] = weight
            if part in division.idle:
                continue
            for c in _collectives(rewritten.graph, tp):
                module = ".".join(x for x in (part.path, c.module) if x)
                collectives.append(replace(c, of=prefix + c.of, module=module))
            for when, (count, size) in _fewest(rewritten).items():
                fewest[when] = fewest[when][0] + count, fewest[when][1] + size
            gathered += [f"{prefix}{node.name} for {op}" for node, op in rewritten.gathered]
    weights = [
        found.get(n) or Weight(n, tuple(p.shape), p.element_size(), "whole", {}, "in Python that is not captured")
        for n, p in division.model.named_parameters()
    ]
    return Plan(
        type(division.model).__name__,
        tp,
        tuple(weights),
        tuple(collectives),
        fewest,
        tuple(dict.fromkeys(gathered)),
        tuple(division.seams),
    )


BEARABLE = 0.01
"""The share of a model's parameters that may stay whole without a word: routers, small heads."""


def announce(plan: Plan, division: Partition, strict: bool = False, stacklevel: int = 3) -> None:
    """Tell the user what stays whole although it is worth splitting: because it has too few pieces for the ranks
    (where that makes ``BEARABLE`` of the parameters or more), or is not captured.

    Args:
        plan: the division's plan.
        division: what is to run.
        strict: whether to refuse it.
        stacklevel: of the warnings.

    Raises:
        PlanError: there is such a thing, and ``strict``.

    Warns:
        PartialCaptureWarning: the model runs in parts.
        WholeWeightWarning: weights stay whole.
    """
    seams = str(division) if division.seams else ""
    share = sum(w.elements for w in plan.obstacles) / max(plan.parameters(), 1)
    obstacles = obstacles_text(plan) if share >= BEARABLE else ""
    if strict and (seams or obstacles):
        raise PlanError("\n".join(x for x in (seams, obstacles, "strict=True asks for all of it to be split.") if x))
    if seams:
        warnings.warn(seams, PartialCaptureWarning, stacklevel=stacklevel)
    if obstacles:
        warnings.warn(obstacles, WholeWeightWarning, stacklevel=stacklevel)


def make_plan(model: nn.Module, tp: int, *, example_inputs: ExampleInputs = None, strict: bool = False) -> Plan:
    """The plan for splitting ``model`` over ``tp`` ranks; nothing is changed.

    No process group is needed and no weight is read: the model may be on the meta device.

    Args:
        model: the dense model.
        tp: the number of ranks.
        example_inputs: as for :func:`autotp.parallelize`.
        strict: as for :func:`autotp.parallelize`.

    Raises:
        CaptureError: no part of the model can be captured.
        PlanError: with ``strict``, something stays whole that is worth splitting.

    Example:
        >>> print(autotp.plan(model, tp=4))
    """
    division = prepare(model, tp, example_inputs)
    plan = plan_of(division, tp)
    announce(plan, division, strict)
    return plan
