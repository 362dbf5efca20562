"""make_plan: read the plan of a model off its rewritten graphs, and warn the user of weights that stay unsplit."""

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
    """The number of elements of a (fake) tensor for the example inputs, and its bytes an element."""
    if not isinstance(value, torch.Tensor):
        return 0, 0
    total = 1
    for size in value.shape:
        total *= size if isinstance(size, int) else int(size.node.hint or 1)
    return total, value.element_size()


def _needed(graph: fx.Graph, value: str) -> dict[fx.Node, bool]:
    """For each node, whether the captured call needs its gradient.

    Args:
        graph: the dense or the rewritten graph.
        value: the key of the node's tensor in ``node.meta``.
    """
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
    """The collectives of a rewritten graph, forward and backward."""
    collectives: list[Collective] = []
    needed = _needed(graph, "global")
    for node in graph.nodes:
        if node.target not in COLLECTIVES:
            continue
        _, forward, backward, group = COLLECTIVES[node.target]
        for kind, when in ((forward, "forward"), (backward if needed[node] else "", "backward")):
            if kind:
                size, module = _size(node, kind, tp), node.meta.get("module", "")
                collectives.append(Collective(kind, when, node.name, module, *size, node.args[group]))
    return collectives


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
    """The style of a split weight, by the first product or look-up that uses it."""
    for user in node.users:
        if user.target in _STYLES:
            return _STYLES[user.target]
        follow = user.target in (ops.enter, ops.enter_overlapping, operator.getitem)
        if follow or op_name(user) in MOVES:
            style = _style(user)
            if style != "split":
                return style
    return "split"


def _why(weight: Layout, style: str, units: str) -> str:
    """The reason for a split weight's layout."""
    overlapping = any(not s.disjoint for _, s in weight.shards)
    if style == "row":
        text = f"contracts {units}: a partial sum, reduced once"
    elif style == "vocabulary":
        text = "each rank looks up its own words, reduced once"
    elif style == "column":
        text = f"makes {units}"
    else:
        text = f"belongs to {units}"
    if overlapping:
        text += "; ranks that need the same shard share it and sum its gradients"
    return text


_UNUSED = "not used in the captured call"


def _weights(rewritten: ShardedProgram, part: CapturedModule) -> Iterator[Weight]:
    """The plan of each weight of a captured module, under the weight's name in the model."""
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
    """The fewest collectives in a forward and a backward, and their bytes for the example inputs."""

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


def plan_of(partition: Partition, tp: int) -> Plan:
    """The plan that a partition follows. The collectives of a captured module count once for each of its calls."""
    planned: dict[str, Weight] = {}
    collectives, gathered = [], []
    fewest = {"forward": (0, 0), "backward": (0, 0)}
    for part in [*partition.parts, *partition.idle]:
        prefix = f"{part.path.replace('.', '_')}_" if part.path else ""
        for call in part.calls:
            rewritten = part.cache.bind(call.args, call.kwargs).entry.program
            for weight in _weights(rewritten, part):
                if planned.get(weight.name, weight).why == _UNUSED or weight.name not in planned:
                    planned[weight.name] = weight
            if part in partition.idle:
                continue
            for c in _collectives(rewritten.graph, tp):
                module = ".".join(x for x in (part.path, c.module) if x)
                collectives.append(replace(c, of=prefix + c.of, module=module))
            for when, (count, size) in _fewest(rewritten).items():
                fewest[when] = fewest[when][0] + count, fewest[when][1] + size
            gathered += [f"{prefix}{node.name} for {op}" for node, op in rewritten.gathered]
    weights = [
        planned.get(n) or Weight(n, tuple(p.shape), p.element_size(), "whole", {}, "in Python that is not captured")
        for n, p in partition.model.named_parameters()
    ]
    return Plan(
        type(partition.model).__name__,
        tp,
        tuple(weights),
        tuple(collectives),
        fewest,
        tuple(dict.fromkeys(gathered)),
        tuple(partition.graph_breaks),
    )


BEARABLE = 0.01
"""The fraction of a model's parameters that may stay unsplit without a warning: routers, small heads."""


def announce(plan: Plan, partition: Partition, strict: bool = False, stacklevel: int = 3) -> None:
    """Warn of weights that stay unsplit although splitting pays: they are not captured, or have too few pieces.

    Too few pieces for the ranks are worth a warning if the weights make up ``BEARABLE`` of the parameters or more.

    Args:
        plan: the partition's plan.
        partition: the captured model.
        strict: raise an error in place of warnings.
        stacklevel: the ``stacklevel`` of the warnings.

    Raises:
        PlanError: there is something to warn of, and ``strict``.

    Warns:
        PartialCaptureWarning: the model runs in parts.
        WholeWeightWarning: weights stay unsplit.
    """
    graph_breaks = str(partition) if partition.graph_breaks else ""
    share = sum(w.elements for w in plan.obstacles) / max(plan.parameters(), 1)
    obstacles = obstacles_text(plan) if share >= BEARABLE else ""
    if strict and (graph_breaks or obstacles):
        message = (graph_breaks, obstacles, "strict=True asks for all of it to be split.")
        raise PlanError("\n".join(paragraph for paragraph in message if paragraph))
    if graph_breaks:
        warnings.warn(graph_breaks, PartialCaptureWarning, stacklevel=stacklevel)
    if obstacles:
        warnings.warn(obstacles, WholeWeightWarning, stacklevel=stacklevel)


def make_plan(model: nn.Module, tp: int, *, example_inputs: ExampleInputs = None, strict: bool = False) -> Plan:
    """The plan for splitting ``model`` over ``tp`` ranks. The model stays as it is.

    No process group is needed and no weight is read: the model may be on the meta device.

    Args:
        model: the dense model.
        tp: the number of ranks.
        example_inputs: as for :func:`autotp.parallelize`.
        strict: as for :func:`autotp.parallelize`.

    Raises:
        CaptureError: no part of the model can be captured.
        PlanError: with ``strict``, something stays unsplit that is worth splitting.

    Example:
        >>> print(autotp.plan(model, tp=4))
    """
    partition = prepare(model, tp, example_inputs)
    plan = plan_of(partition, tp)
    announce(plan, partition, strict)
    return plan
