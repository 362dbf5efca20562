"""deduplicate: make one call of equal ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["deduplicate"]


def _key(argument: Any) -> Any:
    """A key of an argument, equal for equal arguments only (1, 1.0 and True differ)."""
    if isinstance(argument, (tuple, list)):
        return type(argument), tuple(_key(a) for a in argument)
    if isinstance(argument, dict):
        return tuple((k, _key(v)) for k, v in argument.items())
    if isinstance(argument, slice):
        return slice, _key(argument.start), _key(argument.stop), _key(argument.step)
    return type(argument), argument


def is_pure(node: fx.Node) -> bool:
    """Whether a node only computes its result from its arguments, as torch's ops do that are not random."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        is_random = torch.Tag.nondeterministic_seeded in target.tags
        if is_random and target is torch.ops.aten.scaled_dot_product_attention.default:  # only for its dropout
            is_random = bool(node.kwargs.get("dropout_p") or (node.args[4:5] or (0.0,))[0])
        return not (is_random or target._schema.is_mutable)
    return getattr(target, "__module__", "") == "_operator"


def deduplicate(graph: fx.Graph) -> int:
    """Make one call of equal ones, such as those for the masks, rotary tables and casts that each layer computes anew.

    Collectives are never merged, nor are random ops, nor two values that are both results of the graph.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        The number of nodes that were removed.
    """
    first: dict[Any, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_pure(node):
            continue
        try:
            original = first.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        except TypeError:  # an argument that has no hash
            continue
        if original is node or any(u.op == "output" for u in (*node.users, *original.users)):
            continue
        node.replace_all_uses_with(original)
        graph.erase_node(node)
        count += 1
    return count
