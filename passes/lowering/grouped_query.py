"""grouped_query: attention reads each key-value head once for all the query heads that share it, not copies of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import is_tensor, local, remove_dead_code

__all__ = ["grouped_query"]

aten = torch.ops.aten


def _repeated(node: Any) -> tuple[fx.Node, int] | None:
    """Heads, and how often each is repeated, of ``x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)``."""
    if not is_tensor(node) or op_name(node) != "aten.reshape":
        return None
    expanded = node.args[0]
    if not is_tensor(expanded) or op_name(expanded) != "aten.expand":
        return None
    single = expanded.args[0]
    if not is_tensor(single) or op_name(single) != "aten.unsqueeze":
        return None
    heads = single.args[0]
    given, wide, flat = (local(n).shape for n in (heads, expanded, node))
    if len(given) != 4 or len(flat) != 4 or single.args[1] % 5 != 2:
        return None
    count, times = wide[1], wide[2]
    if not isinstance(count, int) or not isinstance(times, int) or flat[1] != count * times:
        return None
    fits = wide == (*given[:2], times, *given[2:]) and flat == (given[0], count * times, *given[2:])
    return (heads, times) if fits else None


def grouped_query(graph: fx.Graph) -> int:
    """Turn keys and values repeated for each query head into ``enable_gqa``.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        How many attentions were changed.
    """
    count = 0
    for node in graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default or node.kwargs.get("enable_gqa"):
            continue
        query, key, value, *rest = node.args
        keys, values = _repeated(key), _repeated(value)
        if keys is None or values is None or keys[1] != values[1] or len(local(query).shape) != 4:
            continue
        if local(query).shape[1] != local(key).shape[1] or keys[1] == 1:
            continue
        node.args = (query, keys[0], values[0], *rest)
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        count += 1
    remove_dead_code(graph)
    return count
