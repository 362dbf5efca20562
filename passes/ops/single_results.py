"""single_results: one result each of ops that return several.

A node whose value is one tensor can have a rule; a node whose value is a tuple has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.flex_attention import flex_attention

__all__ = [
    "OUTPUTS",
    "flex_attention_logsumexp",
    "flex_attention_maxima",
    "flex_attention_outputs",
    "max_indices",
    "max_values",
    "min_indices",
    "min_values",
]

aten = torch.ops.aten


def max_values(x: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
    """The largest values along a dim; of several equal ones, one gets the gradient."""
    return torch.max(x, dim, keepdim).values


def max_indices(x: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
    """The indices of the largest values along a dim."""
    return torch.max(x, dim, keepdim).indices


def min_values(x: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
    """The smallest values along a dim; of several equal ones, one gets the gradient."""
    return torch.min(x, dim, keepdim).values


def min_indices(x: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
    """The indices of the smallest values along a dim."""
    return torch.min(x, dim, keepdim).indices


def flex_attention_outputs(*args: Any) -> torch.Tensor:
    """The attention outputs of flex_attention."""
    return flex_attention(*args)[0]


def flex_attention_logsumexp(*args: Any) -> torch.Tensor:
    """The logsumexp of flex_attention's scores, per query."""
    return flex_attention(*args)[1]


def flex_attention_maxima(*args: Any) -> torch.Tensor:
    """The largest of flex_attention's scores, per query."""
    return flex_attention(*args)[2]


OUTPUTS: dict[Any, tuple[Callable[..., torch.Tensor], ...]] = {
    aten.max.dim: (max_values, max_indices),
    aten.min.dim: (min_values, min_indices),
    flex_attention: (flex_attention_outputs, flex_attention_logsumexp, flex_attention_maxima),
}
"""Per op, the functions that return its single results."""
