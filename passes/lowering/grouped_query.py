"""grouped_query: let attention read each key-value head once for all query heads that share it, without copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import is_tensor, local, remove_dead_code

__all__ = ["grouped_query"]

aten = torch.ops.aten


def _repetition(node: Any) -> tuple[fx.Node, int] | None:
    """The ``x`` and the ``n`` of ``x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)``; None if not."""
    if not is_tensor(node) or op_name(node) != "aten.reshape":
        return None
    expanded = node.args[0]
    if not is_tensor(expanded) or op_name(expanded) != "aten.expand":
        return None
    single = expanded.args[0]
    if not is_tensor(single) or op_name(single) != "aten.unsqueeze":
        return None
    heads = single.args[0]
    shape, wide, flat = (local(n).shape for n in (heads, expanded, node))
    if len(shape) != 4 or len(flat) != 4 or single.args[1] % 5 != 2:
        return None
    count, times = wide[1], wide[2]
    if not isinstance(count, int) or not isinstance(times, int) or flat[1] != count * times:
        return None
    fits = wide == (*shape[:2], times, *shape[2:]) and flat == (shape[0], count * times, *shape[2:])
    return (heads, times) if fits else None


def grouped_query(graph: fx.Graph) -> int:
    """Use ``enable_gqa`` in place of keys and values that are repeated for each query head.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        The number of attentions that were changed.
    """
    count = 0
    for node in graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default or node.kwargs.get("enable_gqa"):
            continue
        query, key, value, *rest = node.args
        keys, values = _repetition(key), _repetition(value)
        if keys is None or values is None or keys[1] != values[1] or len(local(query).shape) != 4:
            continue
        if local(query).shape[1] != local(key).shape[1] or keys[1] == 1:
            continue
        node.args = (query, keys[0], values[0], *rest)
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        count += 1
    remove_dead_code(graph)
    return count
