"""functionalize: no node changes another's value, and no region hides nodes."""

from __future__ import annotations

import operator

import torch
from torch import fx

from passes.graphs import is_tensor, op_name

__all__ = ["functionalize"]


def _may_alias(node: fx.Node) -> bool:
    """Whether a node's value may share memory with another's: by its op's schema, or as a part of one that does."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.target is operator.getitem:
        return _may_alias(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returned = [r.alias_info for r in node.target._schema.returns]
    return op_name(node) == "aten.dropout" or any(a is not None and not a.is_write for a in returned)


def _inline_no_grad(graph: fx.Graph, node: fx.Node) -> None:
    """Put the nodes of a ``wrap_with_set_grad_enabled`` region in place of the call.

    Where the region switched gradients off, its results are detached, which stops them all the same.
    """
    enabled, region_ref, *inputs = node.args
    region = getattr(graph.owning_module, region_ref.target)
    with graph.inserting_before(node):
        copies = dict(zip([n for n in region.graph.nodes if n.op == "placeholder"], inputs, strict=True))
        for inner in region.graph.nodes:
            if inner.op == "output":
                results = fx.map_arg(inner.args[0], lambda n: copies[n])
            elif inner.op != "placeholder":
                copies[inner] = graph.node_copy(inner, lambda n: copies[n])
                if inner.op == "get_attr":  # a region within: regions name theirs alike, so under a name of its own
                    name = f"{region_ref.target}_{inner.target}"
                    setattr(graph.owning_module, name, getattr(region, inner.target))
                    copies[inner].target = name
        if not enabled:
            results = [graph.call_function(torch.ops.aten.detach.default, (r,)) if is_tensor(r) else r for r in results]
            for result in results:
                if isinstance(result, fx.Node) and "val" not in result.meta:
                    result.meta = dict(result.args[0].meta)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not region_ref.users:
        graph.erase_node(region_ref)


def _out_of_place(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``."""
    name = str(target.overloadpacket).removeprefix("aten.")
    if not name.endswith("_") or name.startswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _promotes(functional: torch._ops.OpOverload, node: fx.Node) -> bool:
    """Whether the function's result is of another dtype than the tensor that the in-place op changes."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    return functional(*args, **kwargs).dtype != node.meta["val"].dtype


def functionalize(graph: fx.Graph) -> list[fx.Node]:
    """Inline no-grad regions and turn in-place ops on values that nothing else sees into functions.

    Args:
        graph: a captured graph, changed in place.

    Returns:
        The nodes that still change an argument (through a view, say): none in a graph that is now
        functional. The caller captures again with torch's own functionalization if there are some.
    """
    while regions := [n for n in graph.nodes if op_name(n) == "wrap_with_set_grad_enabled"]:
        for node in regions:
            _inline_no_grad(graph, node)
    left = []
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        functional, changed = _out_of_place(node.target), node.args[0] if node.args else None
        if functional is None or not isinstance(changed, fx.Node) or not is_tensor(changed):
            left.append(node)
            continue
        seen = _may_alias(changed) or any(_may_alias(u) for u in changed.users if order[u] < order[node])
        if op_name(node) != "aten.detach_" and (seen or _promotes(functional, node)):
            left.append(node)
            continue
        node.target = functional
        for user in list(changed.users):
            if order[user] > order[node]:
                user.replace_input_with(changed, node)
    return left
