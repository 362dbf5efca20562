"""minimum: the fewest collectives that a choice of layouts leaves possible, counted on the captured graph.

Counted apart from the passes that place collectives, so that what they place can be held against it.

Forward: every product, look-up or sum over a split dim makes a pending sum, and a pending sum has to be
reduced; those that meet in additions before anything else reads them (an attention and an MLP side by
side) need one reduction for all. A split output is gathered, a loss over split logits shares its sums, and
so does, in both directions, a norm over split features.

Backward: a whole value that ops on shards read has an incomplete gradient, and needs a reduction; one does
for all that are made of one another with no forward reduction between them (a residual, its norms), the
weights that make them riding along. Weights that several ranks hold need one for each sum that they end in.
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
    """The captured nodes that cannot do without a collective, one node for each collective.

    Attributes:
        forward: what is reduced or gathered in a forward.
        backward: whose gradient is reduced in a backward.
        norms: those of both that are norms over split features, for which a few numbers a row are exchanged.
    """

    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    norms: frozenset[fx.Node] = frozenset()


def minimum(
    graph: fx.Graph, facts: Facts, layouts: Mapping[fx.Node, Layout], weight_layouts: Mapping[str, Layout]
) -> Minimum:
    """Count the collectives that the layouts of values make necessary.

    Args:
        graph: the captured graph.
        facts: what :func:`passes.propagate` found out about it.
        layouts: each value's layout (:func:`passes.assign`); those not in it are whole.
        weight_layouts: the weights' layouts, by ``get_attr`` target.
    """

    def split(node: fx.Node) -> bool:
        return not layouts.get(node, WHOLE).whole

    def exchanges(node: fx.Node) -> bool:
        """Whether a norm is over features that are split."""
        value = facts.values[node]
        return any(v in value.virtual(len(value.axes) - 1) for v, _ in layouts.get(node, WHOLE).shards)

    def sums(node: fx.Node) -> bool:
        return bool(facts.pending.get(node)) and not split(node) and any(split(n) for n in node.all_input_nodes)

    def stays(node: fx.Node, user: fx.Node) -> bool:
        """Whether a pending sum that only ``user`` reads can stay one."""
        name, others = op_name(user), [n for n in user.all_input_nodes if n is not node and is_tensor(n)]
        return name in _MOVES or name in _SUMS or (name in _SCALES and user.args[0] is node and not others)

    order = {node: i for i, node in enumerate(graph.nodes)}
    pending = {node for node in graph.nodes if sums(node)}
    groups: dict[fx.Node, None] = {}  # where sums have to be reduced
    for node in pending:
        while len(node.users) == 1 and stays(node, user := next(iter(node.users))):
            node = user
        groups[node] = None
    losses = [n for n in graph.nodes if op_name(n) == "aten.cross_entropy_loss" and split(n.args[0])]
    norms = [n for n in facts.exchanged if exchanges(n)]
    output = graph.output_node()
    slots = output.meta.get("slots", {})  # what stays split between calls
    given = [n for i, n in enumerate(output.args[0]) if isinstance(n, fx.Node) and i not in slots]
    gathered = [n for n in dict.fromkeys(given) if split(n)]

    apart: set[fx.Node] = set()  # what each rank has for itself: shards and what is made of them alone
    weights: set[fx.Node] = set()  # weights and what is made of them alone: in a backward they ride along
    for node in graph.nodes:
        if node.op == "get_attr" or (node.all_input_nodes and weights.issuperset(node.all_input_nodes)):
            weights.add(node)
        if split(node) or (node not in pending and not apart.isdisjoint(node.all_input_nodes)):
            apart.add(node)
    level = levels(graph, groups.__contains__)
    together = nx.Graph()  # whole values that one reduction can complete: no other lies between them
    read = set()
    shared: dict[object, fx.Node] = {}
    end = ends(graph, split, pending.__contains__)
    for node in graph.nodes:
        layout = weight_layouts.get(str(node.target), WHOLE) if node.op == "get_attr" else WHOLE
        if not node.meta.get("grad"):
            continue
        for _, shards in layout.shards:
            if not shards.disjoint:
                shared.setdefault((end[node], shards.replicas or node), node)
        if node in apart or node in weights:
            continue
        if any((u in apart or u in pending or u in losses) and u.meta.get("grad") for u in node.users):
            read.add(node)
        together.add_node(node)
        if node not in pending or node in groups:
            inputs = [n for n in node.all_input_nodes if n in together and level[n] == level[node]]
            together.add_edges_from((n, node) for n in inputs)
    # the last value read stands for them all: it needs a gradient wherever any does
    completed = [max(part & read, key=order.__getitem__) for part in nx.connected_components(together) if part & read]
    return Minimum((*groups, *norms, *losses, *gathered), (*completed, *norms, *shared.values()), frozenset(norms))
