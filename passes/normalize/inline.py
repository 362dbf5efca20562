"""inline: no region without gradients hides nodes."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from passes.graphs import is_tensor, op_name

__all__ = ["inline"]

aten = torch.ops.aten

_MAY_RETURN_ARGUMENT = {"aten.to", "aten.dropout", "aten.real", "aten.resolve_conj", "aten.resolve_neg",
                        "aten.atleast_1d", "aten.atleast_2d", "aten.atleast_3d"}  # fmt: skip
"""Ops that may return their argument itself, although torch.export takes it for a new tensor."""


def _returned_argument(node: fx.Node) -> fx.Node:
    """The argument that an op returned unchanged: a cast to the same dtype, dropout that drops nothing."""
    while op_name(node) in _MAY_RETURN_ARGUMENT and is_tensor(node) and is_tensor(node.args[0]):
        names = (a.name for a in node.target._schema.arguments)
        arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
        source, value = node.args[0].meta["val"], node.meta["val"]
        if arguments.get("copy") or arguments.get("memory_format") is not None or arguments.get("train"):
            break
        if (source.dtype, source.device, source.dim()) != (value.dtype, value.device, value.dim()):
            break
        node = node.args[0]
    return node


def _detach(graph: fx.Graph, node: fx.Node, inputs: Collection[fx.Node]) -> fx.Node:
    """Detach a result of a no-grad region, unless it is one of the region's inputs."""
    if node in inputs:
        return node
    detached = graph.call_function(aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached


def _inline(graph: fx.Graph, node: fx.Node) -> None:
    """Put the nodes of a ``wrap_with_set_grad_enabled`` region in place of the call.

    If the region switched gradients off, its results are detached, which stops gradients as well.
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
                if inner.op == "get_attr":  # an inner region, under a new name: regions reuse names
                    name = f"{region_ref.target}_{inner.target}"
                    setattr(graph.owning_module, name, getattr(region, inner.target))
                    copies[inner].target = name
        if not enabled:
            results = [_detach(graph, _returned_argument(r), inputs) if is_tensor(r) else r for r in results]
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
