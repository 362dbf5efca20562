"""aliases: which nodes' values may share memory, by their ops' schemas."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from passes.graphs import op_name

__all__ = ["aliases", "is_undeclared", "may_alias", "sources"]

_UNDECLARED = {"aten.einsum", "aten.meshgrid", "aten.unsafe_chunk", "aten.unsafe_split", "aten.unsafe_split_with_sizes",
               "aten.broadcast_tensors", "aten.cartesian_prod"}  # fmt: skip
"""Ops whose result may share memory with an operand, although their schema does not say so."""
_DROPS = {"aten.dropout", "aten.alpha_dropout", "aten.feature_dropout", "aten.feature_alpha_dropout"}
"""Ops that return their argument itself if they drop nothing, as torch's own functionalization knows."""


def is_undeclared(node: fx.Node) -> bool:
    """Whether a node's value may share memory with an operand, although its op's schema does not say so."""
    if op_name(node) == "aten.einsum" and len(node.args[1]) > 1:  # a product, in new memory
        return False
    return op_name(node) in _UNDECLARED


def may_alias(node: fx.Node) -> bool:
    """Whether a node's value may share memory with an operand, by its op's schema; or is a result of such a node."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.target is operator.getitem:
        return may_alias(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returned = [r.alias_info for r in node.target._schema.returns]
    return is_undeclared(node) or op_name(node) in _DROPS or any(a is not None and not a.is_write for a in returned)


def sources(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and the nodes upstream whose values its own may be a view of."""
    yield node
    if node.op == "call_function" and may_alias(node):
        for source in node.all_input_nodes:
            yield from sources(source)


def aliases(node: fx.Node) -> dict[fx.Node, None]:
    """A node, and the nodes downstream whose values may be views of its own, in order."""
    views, pending = {node: None}, [node]
    while pending:
        new = [u for u in pending.pop().users if u.op == "call_function" and u not in views and may_alias(u)]
        views.update(dict.fromkeys(new))
        pending += new
    return views
