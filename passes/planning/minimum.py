"""minimum: the fewest collectives that a choice of layouts leaves possible, counted on the captured graph.

The count is independent of the passes that place collectives, so that their result can be held against it.

Forward: every product, look-up or sum over a split dim makes a partial sum, and a partial sum has to be reduced. One
reduction is enough for partial sums that are added before anything else reads them (an attention and an MLP side by
side). A split output is gathered. A loss over split logits exchanges its sums, and so does, in both directions, a norm
over split features.

Backward: a replicated value that ops on shards read has an incomplete gradient, and needs a reduction. One reduction
is enough for all values that are computed from one another with no forward reduction between them (a residual, its
norms, and the weights of these). Weights that several ranks hold need one for each sum that they end in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx
from torch import fx

from passes.graphs import ends, is_tensor, levels, op_name
from passes.layouts.facts import Facts
from passes.layouts.layout import WHOLE, Layout

__all__ = ["Minimum", "minimum"]

_MOVES = {"aten.reshape", "aten.transpose", "aten.permute", "aten.t", "aten.unsqueeze", "aten.squeeze", "aten.flatten",
          "aten.unflatten"}  # fmt: skip
_SUMS = {"aten.add", "aten.sub"}
_SCALES = {"aten.mul", "aten.div", "aten.neg"}


@dataclass(frozen=True)
class Minimum:
    """The captured nodes that need a collective, one node for each collective.

    Attributes:
        forward: the nodes whose values are reduced or gathered in a forward.
        backward: the nodes whose gradients are reduced in a backward.
        norms: the nodes of both that are norms over split features; ranks exchange a few numbers a row for them.
    """

    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    norms: frozenset[fx.Node] = frozenset()


def minimum(
    graph: fx.Graph, facts: Facts, layouts: Mapping[fx.Node, Layout], weight_layouts: Mapping[str, Layout]
) -> Minimum:
    """The collectives that the layouts of values make necessary.

    Args:
        graph: the captured graph.
        facts: the facts from :func:`passes.propagate` about it.
        layouts: the split values' layouts (:func:`passes.assign`); all other values are replicated.
        weight_layouts: the weights' layouts, by ``get_attr`` target.
    """

    def split(node: fx.Node) -> bool:
        return not layouts.get(node, WHOLE).whole

    def exchanges(node: fx.Node) -> bool:
        """Whether a norm is over features that are split."""
        value = facts.values[node]
        return any(v in value.virtual(len(value.axes) - 1) for v, _ in layouts.get(node, WHOLE).shards)

    def is_partial_sum(node: fx.Node) -> bool:
        return bool(facts.pending.get(node)) and not split(node) and any(split(n) for n in node.all_input_nodes)

    def stays_partial(node: fx.Node, user: fx.Node) -> bool:
        """Whether the result of the only user of a partial sum is a partial sum too."""
        name, others = op_name(user), [n for n in user.all_input_nodes if n is not node and is_tensor(n)]
        return name in _MOVES or name in _SUMS or (name in _SCALES and user.args[0] is node and not others)

    order = {node: i for i, node in enumerate(graph.nodes)}
    partial_sums = {node for node in graph.nodes if is_partial_sum(node)}
    reduced: dict[fx.Node, None] = {}  # where partial sums have to be reduced
    for node in partial_sums:
        while len(node.users) == 1 and stays_partial(node, user := next(iter(node.users))):
            node = user
        reduced[node] = None
    losses = [n for n in graph.nodes if op_name(n) == "aten.cross_entropy_loss" and split(n.args[0])]
    norms = [n for n in facts.exchanged if exchanges(n)]
    output = graph.output_node()
    slots = output.meta.get("slots", {})  # results that stay split between calls
    returned = [n for i, n in enumerate(output.args[0]) if isinstance(n, fx.Node) and i not in slots]
    gathered = [n for n in dict.fromkeys(returned) if split(n)]

    varying: set[fx.Node] = set()  # values that differ between ranks: shards, and values computed from them
    weights: set[fx.Node] = set()  # weights, and values computed from weights alone: they join another's reduction
    for node in graph.nodes:
        if node.op == "get_attr" or (node.all_input_nodes and weights.issuperset(node.all_input_nodes)):
            weights.add(node)
        if split(node) or (node not in partial_sums and not varying.isdisjoint(node.all_input_nodes)):
            varying.add(node)
    level = levels(graph, reduced.__contains__)
    related = nx.Graph()  # replicated values, each with those it is computed from without a reduction
    read = set()
    shared: dict[object, fx.Node] = {}  # weights that several ranks hold, one for each sum
    end = ends(graph, split, partial_sums.__contains__)
    for node in graph.nodes:
        layout = weight_layouts.get(str(node.target), WHOLE) if node.op == "get_attr" else WHOLE
        if not node.meta.get("grad"):
            continue
        for _, shards in layout.shards:
            if not shards.disjoint:
                shared.setdefault((end[node], shards.replicas or node), node)
        if node in varying or node in weights:
            continue
        if any((u in varying or u in partial_sums or u in losses) and u.meta.get("grad") for u in node.users):
            read.add(node)
        related.add_node(node)
        if node not in partial_sums or node in reduced:
            inputs = [n for n in node.all_input_nodes if n in related and level[n] == level[node]]
            related.add_edges_from((n, node) for n in inputs)
    # the last value read stands for its component: it needs a gradient wherever any of them does
    components = nx.connected_components(related)
    completed = [max(component & read, key=order.__getitem__) for component in components if component & read]
    return Minimum((*reduced, *norms, *losses, *gathered), (*completed, *norms, *shared.values()), frozenset(norms))
