"""products: column- and row-parallel products, and attention by heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "COLUMN_PARALLEL",
    "ROW_PARALLEL",
    "column_parallel_addmm",
    "column_parallel_baddbmm",
    "column_parallel_einsum",
    "column_parallel_linear",
    "column_parallel_matmul",
    "head_parallel_attention",
    "row_parallel_einsum",
    "row_parallel_linear",
    "row_parallel_matmul",
]


# Products on shards: torch's own arithmetic, under names that tell the split. ----------------------


def column_parallel_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` from the rank's rows of ``weight``: its features of the result."""
    return F.linear(x, weight, bias)


def row_parallel_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` from the rank's columns of ``weight`` and ``x``: a partial sum."""
    return F.linear(x, weight)


def column_parallel_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` from the rank's columns of ``right``: its columns of the result."""
    return torch.matmul(left, right)


def row_parallel_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` from the rank's indices of the contracted dim: a partial sum."""
    return torch.matmul(left, right)


def column_parallel_addmm(
    bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """``beta * bias + alpha * (left @ right)`` from the rank's columns of ``right``."""
    return torch.addmm(bias, left, right, beta=beta, alpha=alpha)


def column_parallel_baddbmm(
    bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """``baddbmm`` from the rank's columns of ``right``."""
    return torch.baddbmm(bias, left, right, beta=beta, alpha=alpha)


def column_parallel_einsum(equation: str, operands: Sequence[torch.Tensor], **options: Any) -> torch.Tensor:
    """``einsum`` where a dim of the result is split."""
    return torch.einsum(equation, *operands)


def row_parallel_einsum(equation: str, operands: Sequence[torch.Tensor], **options: Any) -> torch.Tensor:
    """``einsum`` where a contracted dim is split: a partial sum."""
    return torch.einsum(equation, *operands)


def head_parallel_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Scaled dot-product attention over the rank's own heads."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


COLUMN_PARALLEL: dict[str, Callable[..., torch.Tensor]] = {
    "aten.linear": column_parallel_linear,
    "aten.matmul": column_parallel_matmul,
    "aten.mm": column_parallel_matmul,
    "aten.bmm": column_parallel_matmul,
    "aten.addmm": column_parallel_addmm,
    "aten.baddbmm": column_parallel_baddbmm,
    "aten.einsum": column_parallel_einsum,
}
"""The counterpart of each product whose weight is split along a dim of the result."""

ROW_PARALLEL: dict[str, Callable[..., torch.Tensor]] = {
    "aten.linear": row_parallel_linear,
    "aten.matmul": row_parallel_matmul,
    "aten.mm": row_parallel_matmul,
    "aten.bmm": row_parallel_matmul,
    "aten.addmm": row_parallel_matmul,
    "aten.baddbmm": row_parallel_matmul,
    "aten.einsum": row_parallel_einsum,
}
"""The counterpart of each product whose weight is split along the contracted dim."""
