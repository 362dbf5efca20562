"""rounding: the difference that rounding can make between two computations of the same values."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx

from passes.graphs import op_name
from passes.ops.products import COLUMN_PARALLEL

__all__ = ["depth", "longest_sum", "rounding_error"]

_NARROW = (torch.float16, torch.bfloat16)


def rounding_error(dtype: torch.dtype, steps: int, terms: int) -> float:
    """The relative error that rounding alone can cause.

    Errors of ``n`` roundings in a row grow as the square root of ``n`` in units of the dtype's roundoff
    ``u``, with a constant that is small with a probability near one (Higham and Mary, "A new approach to
    probabilistic rounding error analysis", SIAM J. Sci. Comput. 41 (5), 2019, theorem 2.4; their constant of
    4 fails with a probability under 1e-3). The sums of a product round in the dtype, or in float32 for
    narrower ones, and each step of the graph rounds its result once. Both computations err, and a backward
    is twice as long as a forward.

    Args:
        dtype: the dtype of the values.
        steps: the length of the longest chain of rounding steps in the graph.
        terms: the number of terms of the longest sum.

    Returns:
        The relative error; at least 1e-10, which is far above float64's and far below any fault's.

    Example:
        >>> [f"{rounding_error(t, steps=100, terms=64):.0e}" for t in (torch.float32, torch.bfloat16)]
        ['7e-05', '5e-01']
    """
    rounds = torch.finfo(dtype).eps / 2
    sums = torch.finfo(torch.float32).eps / 2 if dtype in _NARROW else rounds
    return max(1e-10, 2 * 4 * (rounds * math.sqrt(3 * steps) + sums * math.sqrt(3 * steps * max(terms, 1))))


def depth(graphs: Iterable[fx.Graph]) -> int:
    """The length of the longest chain of rounding steps, through graphs that run one after another."""
    total = 0
    for graph in graphs:
        depths: dict[fx.Node, int] = {}
        for node in graph.nodes:
            before = max((depths[n] for n in node.all_input_nodes), default=0)
            depths[node] = before + _rounds(node)
        total += max(depths.values(), default=0)
    return total


def longest_sum(graphs: Iterable[fx.Graph]) -> int:
    """The number of terms of the longest sum in a product with a weight, forward or backward: its longest side."""
    return max((max(_sides(node), default=1) for graph in graphs for node in graph.nodes), default=1)


def _sides(node: fx.Node) -> list[int]:
    """The sizes of the weights that a step multiplies by."""
    weights = [n.meta["val"] for n in node.all_input_nodes if n.op == "get_attr" and "val" in n.meta]
    return [int(n) for w in weights for n in w.shape] if op_name(node) in COLUMN_PARALLEL else []


def _rounds(node: fx.Node) -> bool:
    """Whether a step computes floats; views do not."""
    value = node.meta.get("global", node.meta.get("val"))
    floats = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    schema = getattr(node.target, "_schema", None)
    views = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return node.op == "call_function" and floats and not views
