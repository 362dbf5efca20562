"""Weights and their shards: cutting the local part out, and putting parts together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from passes import Layout, Shards, ops
from passes.ops import context

__all__ = ["local_part", "own_part", "shards_of", "unshard"]


def shards_of(weight_layouts: Mapping[str, Layout], name: str) -> dict[int, Shards]:
    """The split dims of a weight, by dim of the weight."""
    layout = weight_layouts.get(name)
    return layout.dims if layout is not None else {}


def local_part(whole: torch.Tensor, shards: Mapping[int, Shards], rank: int) -> torch.Tensor:
    """The part of a whole tensor that ``rank`` holds (a view where its indices are one run)."""
    for dim, s in shards.items():
        whole = ops.narrow(whole, dim, s.ranks[rank].runs)
    return whole


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, shards: Mapping[int, Shards], rank: int) -> torch.Tensor:
        ctx.shards, ctx.shape, ctx.group = shards, list(whole.shape), context.current().group("tp")
        return local_part(whole, shards, rank).clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        shapes = [list(ctx.shape) for _ in range(ctx.group.size)]
        for dim, s in ctx.shards.items():
            for rank, count in enumerate(s.counts):
                shapes[rank][dim] = count
        return unshard(ctx.group.all_gather(gradient.contiguous(), shapes), ctx.shards), None, None


def own_part(whole: torch.Tensor, shards: Mapping[int, Shards], rank: int) -> torch.Tensor:
    """A copy of the part of a whole tensor that ``rank`` holds; in a backward all get the gradient of the whole."""
    made: torch.Tensor = _OwnPart.apply(whole, shards, rank)
    return made


def unshard(parts: Sequence[torch.Tensor], shards: Mapping[int, Shards]) -> torch.Tensor:
    """The whole tensor from all ranks' parts; of what several hold, the lowest rank's."""
    if not shards:
        return parts[0]
    ((dim, s),) = shards.items()
    shape = list(parts[0].shape)
    shape[dim] = s.size
    whole = parts[0].new_empty(shape)
    for rank in reversed(range(len(parts))):
        start = 0
        for a, b in s.ranks[rank].runs:
            whole.narrow(dim, a, b - a).copy_(parts[rank].narrow(dim, start, b - a))
            start += b - a
    return whole
