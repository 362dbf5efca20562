"""random: random numbers that are the same on all ranks, or each rank's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from passes.ops import context

__all__ = ["random_per_rank", "random_same"]


def random_same(op: Callable[..., torch.Tensor], x: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A random op on replicated values: all ranks draw the same numbers."""
    tensor = next((a for a in (x, *args) if isinstance(a, torch.Tensor)), None)
    device = tensor.device if tensor is not None else torch.device(kwargs.get("device") or "cpu")
    with context.current().random(True, device):
        return op(x, *args, **kwargs)


def random_per_rank(op: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A random op on shards: each rank draws its own numbers."""
    with context.current().random(False, x.device):
        return op(x, *args, **kwargs)
