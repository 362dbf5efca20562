"""enter: where replicated values enter computation on shards, so that every gradient is complete.

When an op on shards reads a replicated value, each rank computes only a part of the value's gradient: the gradient is a
partial sum. So on every way from such a value to ops on shards there must be an ``enter``: an op that does nothing in
a forward, and in a backward sums the ranks' gradients (Megatron's *f*; in SPMD types it makes an invariant value, I, a
replicated one, R). Where to place it is a choice: at a layer norm's result, or at the norm's input and weights. The
cheapest choice is a minimum vertex cut. On one side are the values whose gradients are certainly complete (inputs,
parameters, results that ops on replicated values read too), on the other the operands of ops on shards. A value costs
the bytes of its gradient plus the start of a reduction.

So two norms of one residual that feed attention and MLP side by side are cut once, at the residual: one reduction a
block, which the norms' own weights join. Where two smaller values computed from one value are cut instead (the two
down-projections of multi-head latent attention), they enter in one reduction.
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
"""The cost of starting one reduction, in elements: a large value prefers few reductions to few bytes."""
_VIEWS = {"aten.reshape", "aten.transpose", "aten.permute", "aten.unsqueeze", "aten.squeeze", "aten.flatten"}


def _elements(node: fx.Node) -> int:
    """The number of elements of a node's global value, with symbolic dims as the cost model assumes them."""
    value = node.meta.get("global")
    return CostModel().elements(shape_of(value)) if isinstance(value, torch.Tensor) else 1


def _is_replicated(node: fx.Node) -> bool:
    """Whether a node's value is replicated and has a gradient."""
    return node.meta.get("state") == "whole" and bool(node.meta.get("grad"))


def _on_shards(node: fx.Node) -> bool:
    """Whether a node computes on shards, so that the gradients of its replicated operands are partial sums."""
    if node.op == "output":  # its split results say nothing of its replicated ones
        return False
    return node.meta.get("state") in ("split", "pending") or any(
        n.meta.get("state") == "split" for n in node.all_input_nodes if node.target is not ops.all_gather
    )


def _gives_complete_gradients(node: fx.Node) -> bool:
    """Whether the gradients that a node gives its replicated operands are complete."""
    return node.op == "output" or (bool(node.meta.get("grad")) and not _on_shards(node))


def _enter_shared_weights(graph: fx.Graph) -> None:
    """Insert an ``enter`` for each split parameter whose shards overlap, over just the ranks with the same indices.

    Parameters that end in the same sum (keys' and values' weights, biases and norms of one attention) enter together.
    """
    end = ends(graph, lambda n: n.meta.get("state") == "split", lambda n: n.meta.get("state") == "pending")
    groups: dict[tuple[str, fx.Node, object], list[fx.Node]] = {}
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
            groups.setdefault((name, end[node], _dtype(node)), []).append(node)
            continue
        dim = [d for d, sizes in enumerate(node.meta["axes"]) for _ in sizes][v]
        runs = ((dim, tuple(s.runs for s in shards.ranks)),)
        users = list(node.users)
        with graph.inserting_after(node):
            args = (node, runs, GROUP)
            new = graph.create_node("call_function", ops.enter_overlapping, args, name=f"{node.name}_enter")
        new.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, new)
    for (name, _, _), group in groups.items():
        users_of = {n: list(n.users) for n in group}
        for node, new in _enter_together(graph, group, name).items():
            new.meta = dict(node.meta)
            for user in users_of[node]:
                user.replace_input_with(node, new)


def _enter_together(graph: fx.Graph, group: list[fx.Node], name: str) -> dict[fx.Node, fx.Node]:
    """Insert one ``enter`` for all nodes of a group, after the last of them; returns each node's entered value."""
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


def _has_several_results(node: fx.Node) -> bool:
    """Whether a node returns several values, which can enter only one by one."""
    return isinstance(node.meta["global"], (tuple, list))


def _duplicate_views(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Give each user of a view a copy of its own, so that the viewed value can be cut once.

    Returns:
        Pairs of a view and a copy (twin) of it.
    """
    _, replicated = _candidates(graph)
    twins = []
    for node in reversed(list(graph.nodes)):
        if node not in replicated or op_name(node) not in _VIEWS:
            continue
        for user in list(node.users)[1:]:
            with graph.inserting_after(node):
                twin = graph.node_copy(node)
            twin.meta = dict(node.meta)
            user.replace_input_with(node, twin)
            twins.append((node, twin))
    return twins


def _deduplicate_views(graph: fx.Graph, twins: list[tuple[fx.Node, fx.Node]]) -> None:
    """Replace the copies from :func:`_duplicate_views` that still show the same value by one view."""
    distinct: dict[fx.Node, list[fx.Node]] = {}
    for node, twin in reversed(twins):
        views = distinct.setdefault(node, [node])
        same = next((view for view in views if view.args == twin.args), None)
        if same is None:
            views.append(twin)
        else:
            twin.replace_all_uses_with(same)
            graph.erase_node(twin)


def _candidates(graph: fx.Graph) -> tuple[list[fx.Node], set[fx.Node]]:
    """The replicated values that ops on shards read; and these with all replicated values they are computed from."""
    read = [n for n in graph.nodes if _is_replicated(n) and any(_on_shards(u) for u in n.users)]
    candidates, stack = set(read), list(read)
    while stack:
        for n in _replicated_inputs(stack.pop()):
            if n not in candidates:
                candidates.add(n)
                stack.append(n)
    return read, candidates


def _replicated_inputs(node: fx.Node) -> list[fx.Node]:
    """The differentiable inputs of an op on replicated values; none for graph inputs and collectives."""
    if node.op != "call_function" or node.target in (ops.all_reduce, ops.all_gather) or _on_shards(node):
        return []
    return [n for n in node.all_input_nodes if n.meta.get("grad")]


def _cheapest_cut(graph: fx.Graph) -> tuple[list[fx.Node], set[fx.Node]]:
    """The values to enter, and the values computed from entered ones (their gradients are partial sums)."""
    read, candidates = _candidates(graph)
    if not read:
        return [], set()
    flow, source, sink = nx.DiGraph(), "complete", "shards"
    for node in read:
        flow.add_edge((node, 1), sink)
    for node in candidates:
        start = 0 if node.op == "get_attr" else _START  # a weight rides along with an activation
        capacity = {} if _has_several_results(node) else {"capacity": _elements(node) + start}
        flow.add_edge((node, 0), (node, 1), **capacity)
        inputs = _replicated_inputs(node)
        stays = any(_gives_complete_gradients(u) and u not in candidates for u in node.users)
        if stays or not inputs or not all(_is_replicated(n) for n in inputs):
            flow.add_edge(source, (node, 0))
        for n in inputs:
            if n in candidates:
                flow.add_edge((n, 1), (node, 0))  # computed from entered values only if all inputs are entered
                flow.add_edge((node, 0), (n, 0))  # and from values before their enter only if these are still there
    _, (complete, entered) = nx.minimum_cut(flow, source, sink)
    cut = [n for n in graph.nodes if n in candidates and (n, 0) in complete and (n, 1) in entered]
    return cut, {n for n in candidates if (n, 0) in entered}


def _groups(graph: fx.Graph, cut: list[fx.Node], inside: set[fx.Node]) -> list[list[fx.Node]]:
    """The groups of values to enter: each activation, with the parameters that are first read after it and before the
    next activation. Parameters that are read before any activation make groups by dtype."""
    order = {n: i for i, n in enumerate(graph.nodes)}

    def first_use(node: fx.Node) -> int:
        """The place in the graph of the first node that reads the entered value."""
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


def _merged_groups(graph: fx.Graph, groups: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """The groups, with those merged whose values are computed from one value without communication on the way."""
    level = levels(graph, lambda n: n.target in (ops.all_reduce, ops.all_gather) or n.meta.get("state") == "pending")
    related = nx.Graph()
    for node in graph.nodes:
        if _is_replicated(node) and node.op != "get_attr":
            inputs = [n for n in _replicated_inputs(node) if level[n] == level[node] and n.op != "get_attr"]
            related.add_edges_from((n, node) for n in inputs)
    merged: dict[object, list[fx.Node]] = {}
    component = {n: i for i, nodes in enumerate(nx.connected_components(related)) for n in nodes}
    for group in groups:
        merged.setdefault((component.get(group[0], group[0]), _dtype(group[0])), []).extend(group)
    return list(merged.values())


def _sort(graph: fx.Graph) -> None:
    """Sort the nodes so that each comes after its inputs, and keep their order otherwise."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    nodes, missing = list(order), {n: len(n.all_input_nodes) for n in order}
    ready = [i for i, n in enumerate(nodes) if not missing[n]]
    last = graph._root
    while ready:
        node = nodes[heapq.heappop(ready)]
        last.append(node)
        last = node
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, order[user])


def _dtype(node: fx.Node) -> object:
    """The dtype of a node's value."""
    return node.meta["global"].dtype


def enter(graph: fx.Graph) -> int:
    """Insert ``enter`` nodes into a rewritten graph, in place.

    Every node gets its SPMD type in ``meta["type"]``: I (invariant), R (replicated), V (varying) or P (partial sum).

    Args:
        graph: the graph from :func:`passes.shard`, whose nodes carry ``state`` (``whole``: replicated, ``split``, or
            ``pending``: a partial sum), ``grad``, ``layout`` and ``global`` (the captured value) in their meta.

    Returns:
        The number of inserted nodes, each of which is one reduction in a backward.
    """
    _enter_shared_weights(graph)
    twins = _duplicate_views(graph)
    cut, inside = _cheapest_cut(graph)
    groups = _merged_groups(graph, _groups(graph, cut, inside))
    for group in groups:
        users = {n: [u for u in n.users if _on_shards(u) or u in inside] for n in group}
        entered = _enter_together(graph, group, GROUP)
        for n, new in entered.items():
            new.meta = {**n.meta, "type": "R", "module": group[0].meta["module"]}
            for user in users[n]:
                user.replace_input_with(n, new)
    _deduplicate_views(graph, twins)
    _sort(graph)
    for node in graph.nodes:
        kind = {"whole": "I", "split": "V", "pending": "P"}.get(node.meta.get("state", ""), "I")
        node.meta.setdefault("type", "R" if node in inside else kind)
    return sum(node.target in (ops.enter, ops.enter_overlapping) for node in graph.nodes)
