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
"""What may share memory though its schema does not say so; einsum where it multiplies nothing."""
_DROPS = {"aten.dropout", "aten.alpha_dropout", "aten.feature_dropout", "aten.feature_alpha_dropout"}
"""What returns its argument itself where nothing is dropped, as torch's own functionalization knows."""


def is_undeclared(node: fx.Node) -> bool:
    """Whether a node's value may share memory with its input though the schema does not say so."""
    if op_name(node) == "aten.einsum" and len(node.args[1]) > 1:  # a product, in memory of its own
        return False
    return op_name(node) in _UNDECLARED


def may_alias(node: fx.Node) -> bool:
    """Whether a node's value may share memory with another's: by its op's schema, or as a part of one that does."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.target is operator.getitem:
        return may_alias(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returned = [r.alias_info for r in node.target._schema.returns]
    return is_undeclared(node) or op_name(node) in _DROPS or any(a is not None and not a.is_write for a in returned)


def sources(node: fx.Node) -> Iterator[fx.Node]:
    """A node and those that its value may share memory with because it is made of them."""
    yield node
    if node.op == "call_function" and may_alias(node):
        for source in node.all_input_nodes:
            yield from sources(source)


def aliases(node: fx.Node) -> dict[fx.Node, None]:
    """A node and those whose values may share memory with its own because they are made of it, in order."""
    found, pending = {node: None}, [node]
    while pending:
        made = [u for u in pending.pop().users if u.op == "call_function" and u not in found and may_alias(u)]
        found.update(dict.fromkeys(made))
        pending += made
    return found
