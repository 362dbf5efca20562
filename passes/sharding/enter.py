"""enter: where whole values enter computation on shards, so that every gradient is complete.

A whole value that an op on shards reads gets, on each rank, only a part of its gradient; somewhere
between where it is made and where it is read it must pass an ``enter``, whose backward sums the
parts. Where is a choice: a layer norm's result, or the norm's input and its weights. What costs the
least is a minimum vertex cut between what is certainly whole in its gradient (inputs, parameters,
results that others read as whole values too) and the operands of ops on shards; a value costs the
bytes of its gradient plus the start of a reduction.

Two norms of one residual that feed attention and MLP side by side are so cut once, at the residual
(one reduction a block), and the norms' own weights ride along in the same reduction. Where two smaller
values made of one are cut instead (the two down-projections of multi-head latent attention), they enter
side by side, in one reduction.
"""

from __future__ import annotations

import heapq
import operator

import networkx as nx
import torch
from torch import fx

from passes import ops
from passes.graphs import ends, levels, op_name
from passes.layouts.axes import shape_of
from passes.layouts.layout import Shards
from passes.layouts.sharded_value import GROUP
from passes.ops.context import replica_group
from passes.planning.cost import CostModel

__all__ = ["enter"]

_START = 1 << 16
"""What starting one reduction costs, in elements: a large value prefers few reductions to few bytes."""
_VIEWS = {"aten.reshape", "aten.transpose", "aten.permute", "aten.unsqueeze", "aten.squeeze", "aten.flatten"}


def elements(node: fx.Node) -> int:
    """The size of a node's (global) value, symbolic dims counted as the cost model does."""
    value = node.meta.get("global")
    return CostModel().elements(shape_of(value)) if isinstance(value, torch.Tensor) else 1


def _is_whole(node: fx.Node) -> bool:
    return node.meta.get("state") == "whole" and bool(node.meta.get("grad"))


def _on_shards(node: fx.Node) -> bool:
    """Whether a node computes on shards, so that its whole operands get partial gradients."""
    if node.op == "output":  # what it returns in parts says nothing of what it returns whole
        return False
    return node.meta.get("state") in ("split", "pending") or any(
        n.meta.get("state") == "split" for n in node.all_input_nodes if node.target is not ops.all_gather
    )


def _wants_whole(node: fx.Node) -> bool:
    """Whether the gradients that a node gives its whole operands are whole."""
    return node.op == "output" or (bool(node.meta.get("grad")) and not _on_shards(node))


def _replicas(graph: fx.Graph) -> None:
    """Let parameters that several ranks hold in part or whole enter over just those ranks.

    Those that end in the same sum (keys' and values' weights, biases and norms of one attention) enter together.
    """
    end = ends(graph, lambda n: n.meta.get("state") == "split", lambda n: n.meta.get("state") == "pending")
    together: dict[tuple[str, fx.Node, object], list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.op not in ("get_attr", "placeholder") or not node.meta["grad"] or node.meta["state"] != "split":
            continue
        layout = node.meta["layout"]
        if all(s.disjoint for _, s in layout.shards) or len(layout.shards) != 1:
            continue
        ((v, shards),) = layout.shards
        assert isinstance(shards, Shards)
        if shards.replicas is not None:
            name = replica_group(GROUP, shards.replicas)
            together.setdefault((name, end[node], _dtype(node)), []).append(node)
            continue
        dim = [d for d, sizes in enumerate(node.meta["axes"]) for _ in sizes][v]
        places = ((dim, tuple(s.runs for s in shards.ranks)),)
        users = list(node.users)
        with graph.inserting_after(node):
            args = (node, places, GROUP)
            new = graph.create_node("call_function", ops.enter_overlapping, args, name=f"{node.name}_enter")
        new.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, new)
    for (name, _, _), group in together.items():
        users_of = {n: list(n.users) for n in group}
        for node, new in _enter_together(graph, group, name).items():
            new.meta = dict(node.meta)
            for user in users_of[node]:
                user.replace_input_with(node, new)


def _enter_together(graph: fx.Graph, group: list[fx.Node], name: str) -> dict[fx.Node, fx.Node]:
    """Insert one ``enter`` for all of ``group`` after the last of them; what stands for each behind it."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    with graph.inserting_after(max(group, key=order.__getitem__)):
        if len(group) == 1:
            (node,) = group
            return {node: graph.create_node("call_function", ops.enter, (node, name), name=f"{node.name}_enter")}
        pack = graph.create_node(
            "call_function", ops.enter, (tuple(group), name), name=f"{group[0].name}_enter_together"
        )
    pack.meta = {**group[0].meta, "together": [n.name for n in group], "global": None}
    entered, last = {}, pack
    for i, n in enumerate(group):
        with graph.inserting_after(last):
            last = graph.create_node("call_function", operator.getitem, (pack, i), name=f"{n.name}_enter")
        entered[n] = last
    return entered


def _several(node: fx.Node) -> bool:
    """Whether a node stands for several values at once, each of which enters for itself."""
    return isinstance(node.meta["global"], (tuple, list))


def _views_apart(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Let each user of a view have one of its own, so that what it shows can be cut once; each view with its twins."""
    _, seen = _candidates(graph)
    twins = []
    for node in reversed(list(graph.nodes)):
        if node not in seen or op_name(node) not in _VIEWS:
            continue
        for user in list(node.users)[1:]:
            with graph.inserting_after(node):
                twin = graph.node_copy(node)
            twin.meta = dict(node.meta)
            user.replace_input_with(node, twin)
            twins.append((node, twin))
    return twins


def _reunite(graph: fx.Graph, twins: list[tuple[fx.Node, fx.Node]]) -> None:
    """Make twins that still show the same one again."""
    kept: dict[fx.Node, list[fx.Node]] = {}
    for node, twin in reversed(twins):
        others = kept.setdefault(node, [node])
        same = next((other for other in others if other.args == twin.args), None)
        if same is None:
            others.append(twin)
        else:
            twin.replace_all_uses_with(same)
            graph.erase_node(twin)


def _candidates(graph: fx.Graph) -> tuple[list[fx.Node], set[fx.Node]]:
    """The whole values that ops on shards read, and all whole values that those are made of."""
    wanted = [n for n in graph.nodes if _is_whole(n) and any(_on_shards(u) for u in n.users)]
    seen, stack = set(wanted), list(wanted)
    while stack:
        for n in _made_of(stack.pop()):
            if n not in seen:
                seen.add(n)
                stack.append(n)
    return wanted, seen


def _made_of(node: fx.Node) -> list[fx.Node]:
    """The differentiable whole inputs of an op on whole values; none for inputs and collectives."""
    if node.op != "call_function" or node.target in (ops.all_reduce, ops.all_gather) or _on_shards(node):
        return []
    return [n for n in node.all_input_nodes if n.meta.get("grad")]


def _cheapest_cut(graph: fx.Graph) -> tuple[list[fx.Node], set[fx.Node]]:
    """The values to enter, and the values computed from entered ones (whose gradients are partial)."""
    wanted, seen = _candidates(graph)
    if not wanted:
        return [], set()
    flow, source, sink = nx.DiGraph(), "whole", "shards"
    for node in wanted:
        flow.add_edge((node, 1), sink)
    for node in seen:
        start = 0 if node.op == "get_attr" else _START  # a weight rides along with an activation
        capacity = {} if _several(node) else {"capacity": elements(node) + start}
        flow.add_edge((node, 0), (node, 1), **capacity)
        inputs = _made_of(node)
        stays = any(_wants_whole(u) and u not in seen for u in node.users)
        if stays or not inputs or not all(_is_whole(n) for n in inputs):
            flow.add_edge(source, (node, 0))
        for n in inputs:
            if n in seen:
                flow.add_edge((n, 1), (node, 0))  # computed from entered values only if all inputs are entered
                flow.add_edge((node, 0), (n, 0))  # and from whole ones only if they are still there
    _, (whole, entered) = nx.minimum_cut(flow, source, sink)
    cut = [n for n in graph.nodes if n in seen and (n, 0) in whole and (n, 1) in entered]
    return cut, {n for n in seen if (n, 0) in entered}


def _together(graph: fx.Graph, cut: list[fx.Node], inside: set[fx.Node]) -> list[list[fx.Node]]:
    """Group the values to enter: each activation for itself, and with it the parameters that are first
    read after it and before the next; parameters read before any activation make a group."""
    order = {n: i for i, n in enumerate(graph.nodes)}

    def first_use(node: fx.Node) -> int:
        return min(order[u] for u in node.users if _on_shards(u) or u in inside)

    groups = [[n] for n in cut if n.op != "get_attr"]
    alone: dict[object, list[fx.Node]] = {}
    for node in cut:
        if node.op != "get_attr":
            continue
        before = [g for g in groups if order[g[0]] < first_use(node) and _dtype(g[0]) == _dtype(node)]
        if before:
            max(before, key=lambda g: order[g[0]]).append(node)
        else:
            alone.setdefault(_dtype(node), []).append(node)
    return groups + list(alone.values())


def _side_by_side(graph: fx.Graph, groups: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Join groups whose values are made of one value with no communication on the way."""
    level = levels(graph, lambda n: n.target in (ops.all_reduce, ops.all_gather) or n.meta.get("state") == "pending")
    made = nx.Graph()
    for node in graph.nodes:
        if _is_whole(node) and node.op != "get_attr":
            made.add_edges_from((n, node) for n in _made_of(node) if level[n] == level[node] and n.op != "get_attr")
    joined: dict[object, list[fx.Node]] = {}
    of = {n: i for i, part in enumerate(nx.connected_components(made)) for n in part}
    for group in groups:
        joined.setdefault((of.get(group[0], group[0]), _dtype(group[0])), []).extend(group)
    return list(joined.values())


def _in_order(graph: fx.Graph) -> None:
    """Sort the nodes so that each comes after its inputs, and otherwise as they were."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    nodes, missing = list(place), {n: len(n.all_input_nodes) for n in place}
    ready = [i for i, n in enumerate(nodes) if not missing[n]]
    last = graph._root
    while ready:
        node = nodes[heapq.heappop(ready)]
        last.append(node)
        last = node
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, place[user])


def _dtype(node: fx.Node) -> object:
    return node.meta["global"].dtype


def enter(graph: fx.Graph) -> int:
    """Insert ``enter`` nodes into a rewritten graph, in place, and give every node its SPMD type in
    ``meta["type"]``: I, R, V or P.

    Args:
        graph: the graph from :func:`passes.shard`, whose nodes carry ``state`` (``whole``, ``split``,
            ``pending``), ``grad``, ``layout`` and ``global`` (the captured value) in their meta.

    Returns:
        The number of reductions in a backward pass that the inserted nodes stand for.
    """
    _replicas(graph)
    twins = _views_apart(graph)
    cut, inside = _cheapest_cut(graph)
    groups = _side_by_side(graph, _together(graph, cut, inside))
    for group in groups:
        users = {n: [u for u in n.users if _on_shards(u) or u in inside] for n in group}
        entered = _enter_together(graph, group, GROUP)
        for n, new in entered.items():
            new.meta = {**n.meta, "type": "R", "module": group[0].meta["module"]}
            for user in users[n]:
                user.replace_input_with(n, new)
    _reunite(graph, twins)
    _in_order(graph)
    for node in graph.nodes:
        kind = {"whole": "I", "split": "V", "pending": "P"}.get(node.meta.get("state", ""), "I")
        node.meta.setdefault("type", "R" if node in inside else kind)
    return sum(node.target in (ops.enter, ops.enter_overlapping) for node in graph.nodes)
