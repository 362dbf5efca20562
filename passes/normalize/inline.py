"""inline: no region without gradients hides nodes."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from passes.graphs import is_tensor, op_name

__all__ = ["inline"]

aten = torch.ops.aten

_ITSELF = {"aten.to", "aten.dropout", "aten.real", "aten.resolve_conj", "aten.resolve_neg", "aten.atleast_1d",
           "aten.atleast_2d", "aten.atleast_3d"}  # fmt: skip
"""What may return its argument itself, which torch.export takes for a new tensor."""


def _itself(node: fx.Node) -> fx.Node:
    """The argument that an op returned as it was: of a cast to its own type, of dropout that drops nothing."""
    while op_name(node) in _ITSELF and is_tensor(node) and is_tensor(node.args[0]):
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
        was, value = node.args[0].meta["val"], node.meta["val"]
        if given.get("copy") or given.get("memory_format") is not None or given.get("train"):
            break
        if (was.dtype, was.device, was.dim()) != (value.dtype, value.device, value.dim()):
            break
        node = node.args[0]
    return node


def _stopped(graph: fx.Graph, node: fx.Node, inputs: Collection[fx.Node]) -> fx.Node:
    """A result of a region without gradients; one that is an input as it was keeps its own."""
    if node in inputs:
        return node
    stopped = graph.call_function(aten.detach.default, (node,))
    stopped.meta = dict(node.meta)
    return stopped


def _inline(graph: fx.Graph, node: fx.Node) -> None:
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
                copies[inner].meta["no_grad"] = not enabled
                if inner.op == "get_attr":  # a region within: regions name theirs alike, so under a name of its own
                    name = f"{region_ref.target}_{inner.target}"
                    setattr(graph.owning_module, name, getattr(region, inner.target))
                    copies[inner].target = name
        if not enabled:
            results = [_stopped(graph, _itself(r), inputs) if is_tensor(r) else r for r in results]
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not region_ref.users:
        graph.erase_node(region_ref)


def inline(graph: fx.Graph) -> None:
    """Put the nodes of no-grad regions in place of the calls, marked ``no_grad`` in their meta.

    Args:
        graph: a captured graph, changed in place.
    """
    while regions := [n for n in graph.nodes if op_name(n) == "wrap_with_set_grad_enabled"]:
        for node in regions:
            _inline(graph, node)
