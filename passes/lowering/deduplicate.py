"""deduplicate: what is computed twice is computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["deduplicate"]


def _key(argument: Any) -> Any:
    """An argument, so that equal keys mean the same argument (1 and 1.0 and True are not)."""
    if isinstance(argument, (tuple, list)):
        return type(argument), tuple(_key(a) for a in argument)
    if isinstance(argument, dict):
        return tuple((k, _key(v)) for k, v in argument.items())
    if isinstance(argument, slice):
        return slice, _key(argument.start), _key(argument.stop), _key(argument.step)
    return type(argument), argument


def is_pure(node: fx.Node) -> bool:
    """Whether a node computes its result from its arguments and does nothing else: torch's own ops, but random ones."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        drawn = torch.Tag.nondeterministic_seeded in target.tags
        if drawn and target is torch.ops.aten.scaled_dot_product_attention.default:  # only for its dropout
            drawn = bool(node.kwargs.get("dropout_p") or (node.args[4:5] or (0.0,))[0])
        return not (drawn or target._schema.is_mutable)
    return getattr(target, "__module__", "") == "_operator"


def deduplicate(graph: fx.Graph) -> int:
    """Merge calls of one op on the same arguments: masks, rotary tables and casts that each layer makes anew.

    What meets other ranks is never merged, nor what draws random numbers, nor what the caller gets as two results.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        How many nodes went.
    """
    first: dict[Any, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_pure(node):
            continue
        try:
            found = first.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        except TypeError:  # an argument that has no hash
            continue
        if found is node or any(u.op == "output" for u in (*node.users, *found.users)):
            continue
        node.replace_all_uses_with(found)
        graph.erase_node(node)
        count += 1
    return count
