"""Single results of ops that give several: a node with one tensor as its value has a rule, a tuple has none."""

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
    """The largest values along a dim; the gradient goes to one of several that are as large."""
    return torch.max(x, dim, keepdim).values


def max_indices(x: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
    """Where the largest values along a dim are."""
    return torch.max(x, dim, keepdim).indices


def min_values(x: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
    """The smallest values along a dim; the gradient goes to one of several that are as small."""
    return torch.min(x, dim, keepdim).values


def min_indices(x: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
    """Where the smallest values along a dim are."""
    return torch.min(x, dim, keepdim).indices


def flex_attention_outputs(*args: Any) -> torch.Tensor:
    """What flex_attention mixes of the values."""
    return flex_attention(*args)[0]


def flex_attention_logsumexp(*args: Any) -> torch.Tensor:
    """The logarithms of the sums that flex_attention's softmax divides by."""
    return flex_attention(*args)[1]


def flex_attention_maxima(*args: Any) -> torch.Tensor:
    """The largest scores of flex_attention's queries."""
    return flex_attention(*args)[2]


OUTPUTS: dict[Any, tuple[Callable[..., torch.Tensor], ...]] = {
    aten.max.dim: (max_values, max_indices),
    aten.min.dim: (min_values, min_indices),
    flex_attention: (flex_attention_outputs, flex_attention_logsumexp, flex_attention_maxima),
}
"""Per op, what gives each of its results."""
