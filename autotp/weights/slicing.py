"""slicing: cut a rank's shard out of a tensor, and join shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from passes import Layout, Shards, ops
from passes.ops import context

__all__ = ["local_part", "own_part", "shards_of", "unshard"]


def shards_of(weight_layouts: Mapping[str, Layout], name: str) -> dict[int, Shards]:
    """The split dims of a weight: for each the ranks' indices."""
    layout = weight_layouts.get(name)
    return layout.dims if layout is not None else {}


def local_part(tensor: torch.Tensor, shards: Mapping[int, Shards], rank: int) -> torch.Tensor:
    """A rank's shard of a dense tensor (a view where its indices are one run)."""
    for dim, s in shards.items():
        tensor = ops.narrow(tensor, dim, s.ranks[rank].runs)
    return tensor


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, shards: Mapping[int, Shards], rank: int) -> torch.Tensor:
        ctx.shards, ctx.shape, ctx.group = shards, list(tensor.shape), context.current().group("tp")
        return local_part(tensor, shards, rank).clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        shapes = [list(ctx.shape) for _ in range(ctx.group.size)]
        for dim, s in ctx.shards.items():
            for rank, count in enumerate(s.counts):
                shapes[rank][dim] = count
        return unshard(ctx.group.all_gather(gradient.contiguous(), shapes), ctx.shards), None, None


def own_part(tensor: torch.Tensor, shards: Mapping[int, Shards], rank: int) -> torch.Tensor:
    """A copy of a rank's shard of a dense tensor; in the backward all ranks get the gradient of the dense tensor."""
    shard: torch.Tensor = _OwnPart.apply(tensor, shards, rank)
    return shard


def unshard(tensors: Sequence[torch.Tensor], shards: Mapping[int, Shards]) -> torch.Tensor:
    """The dense tensor from all ranks' shards of it; where several ranks hold an element, the lowest rank's counts."""
    if not shards:
        return tensors[0]
    ((dim, s),) = shards.items()
    shape = list(tensors[0].shape)
    shape[dim] = s.size
    dense = tensors[0].new_empty(shape)
    for rank in reversed(range(len(tensors))):
        start = 0
        for a, b in s.ranks[rank].runs:
            dense.narrow(dim, a, b - a).copy_(tensors[rank].narrow(dim, start, b - a))
            start += b - a
    return dense
