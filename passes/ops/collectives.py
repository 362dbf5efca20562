"""collectives: the differentiable collectives of rewritten graphs.

The types of a collective determine its backward. They are the SPMD types of ``spmd-types``: I invariant, R replicated
with a partial gradient, V varying, P partial sum. ``enter`` and ``all_reduce`` are *f* and *g* of Megatron-LM
(https://arxiv.org/abs/1909.08053).

====================  ======  =================================  =================================
op                    types   forward                            backward
====================  ======  =================================  =================================
``enter``             I -> R  nothing                            all-reduce
``all_reduce``        P -> I  all-reduce                         nothing
``all_gather``        V -> I  all-gather                         take own slice
``narrow``            R -> V  take own slice                     pad with zeros
====================  ======  =================================  =================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from passes.layouts.layout import IndexSet, Shards
from passes.ops import context

__all__ = [
    "all_gather",
    "all_reduce",
    "all_reduce_",
    "broadcast_from_first",
    "deduplicate_gradient",
    "enter",
    "enter_overlapping",
    "narrow",
    "start_all_reduce",
    "start_all_reduce_",
    "take",
    "wait",
]

Pending = Callable[[], torch.Tensor]
"""A collective that was begun: call it to wait for the result, which it returns."""
Runs = tuple[tuple[int, int], ...]
"""Indices as half-open ranges."""
Places = tuple[tuple[int, tuple[Runs, ...]], ...]
"""Per split dim, the dim and each rank's indices."""


# Collectives ---------------------------------------------------------------------------------------


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: context.Communicator) -> torch.Tensor:
        return group.all_reduce(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """P -> I: the sum of the ranks' tensors, on every rank. The gradient passes unchanged."""
    return _AllReduce.apply(x, context.current().group(group))


def all_reduce_(x: torch.Tensor, group: str) -> torch.Tensor:
    """:func:`all_reduce` where no gradient is wanted and nothing reads ``x`` any more: it may be written over."""
    return context.current().group(group).all_reduce_(x)


def start_all_reduce(x: torch.Tensor, group: str) -> Pending:
    """Begin :func:`all_reduce`, where no gradient is wanted; :func:`wait` gives the sum."""
    return start_all_reduce_(x.clone(), group)


def start_all_reduce_(x: torch.Tensor, group: str) -> Pending:
    """:func:`start_all_reduce` where nothing reads ``x`` any more: it may be written over."""
    return context.current().group(group).start_all_reduce(x)


def wait(pending: Pending) -> torch.Tensor:
    """The sum that was begun. Until then ranks must not communicate in another op."""
    return pending()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: context.Communicator, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)  # a value without a gradient has none here either, as in the dense model
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        present = [g for g in grads if g is not None]
        if len(present) == 1:
            return None, *(g if g is None else ctx.group.all_reduce(g) for g in grads)
        summed = ctx.group.all_reduce(torch.cat([g.reshape(-1) for g in present]))
        parts = iter(summed.split([g.numel() for g in present]))
        return None, *(g if g is None else next(parts).view(g.shape) for g in grads)


def enter(x: torch.Tensor | tuple[torch.Tensor, ...], group: str) -> Any:
    """I -> R: replicated values, for computation on shards. Their gradients are summed over the group.

    Several values of one dtype may enter together; one all-reduce then sums all their gradients.
    """
    tensors = x if isinstance(x, tuple) else (x,)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        tensors = _Enter.apply(context.current().group(group), *tensors)
    return tensors if isinstance(x, tuple) else tensors[0]


class _BroadcastFromFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: context.Communicator) -> torch.Tensor:
        ctx.first = group.rank == 0
        return group.all_reduce(x if ctx.first else torch.zeros_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] if ctx.first else torch.zeros_like(grads[0]), None


def broadcast_from_first(x: torch.Tensor, group: str) -> torch.Tensor:
    """V -> I: the first rank's tensor, bit by bit, on every rank; the first rank alone gets the gradient.

    For values that each rank has computed in full, perhaps with other rounding.
    """
    return _BroadcastFromFirst.apply(x, context.current().group(group))


class _EnterOverlapping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: Places, group: context.Communicator) -> torch.Tensor:
        ctx.places, ctx.group = places, group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, group = grads[0], ctx.group
        full = grad.new_zeros(_global_shape(grad.shape, ctx.places))
        _put(full, grad, ctx.places, group.rank)
        return _take(group.all_reduce(full), ctx.places, group.rank), None, None


def enter_overlapping(x: torch.Tensor, places: Places, group: str) -> torch.Tensor:
    """V -> V: the shard itself; gradients of indices that several ranks hold are summed.

    For shards that overlap without being equal. ``places`` is as in :func:`all_gather`.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _EnterOverlapping.apply(x, places, context.current().group(group))


class _DeduplicateGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, mine: Runs) -> torch.Tensor:
        ctx.dim, ctx.mine = dim, mine
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        own = torch.zeros_like(grads[0])
        for a, b in ctx.mine:
            own.narrow(ctx.dim, a, b - a).copy_(grads[0].narrow(ctx.dim, a, b - a))
        return own, None, None


def deduplicate_gradient(x: torch.Tensor, dim: int, mine: Runs) -> torch.Tensor:
    """The shard itself; its gradient counts only at the local positions ``mine`` along ``dim``.

    For a result that overlaps other ranks' shards: the caller's gradient of a shared index is the same on all ranks
    that hold it, and ``mine`` contains each index on one rank only.
    """
    return _DeduplicateGradient.apply(x, dim, mine) if torch.is_grad_enabled() and x.requires_grad else x


def _indices(runs: Runs, device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(a, b, device=device) for a, b in runs])


def _global_shape(shape: Sequence[int], places: Places) -> list[int]:
    sizes = list(shape)
    for dim, ranks in places:
        sizes[dim] = _size(ranks)
    return sizes


def _size(ranks: Sequence[Runs]) -> int:
    """The global size of a dim, from the indices that each rank holds."""
    return max(b for runs in ranks for _, b in runs)


def _take(full: torch.Tensor, places: Places, rank: int) -> torch.Tensor:
    for dim, ranks in places:
        full = narrow(full, dim, ranks[rank])
    return full


def _put(full: torch.Tensor, shard: torch.Tensor, places: Places, rank: int) -> None:
    """``full[ix_(...)] = shard`` for index sets on some dims."""
    dims = [d for d, _ in places]
    order = dims + [d for d in range(full.dim()) if d not in dims]
    indices = [_indices(ranks[rank], full.device) for _, ranks in places]
    grid = [x.view([-1 if i == j else 1 for j in range(len(indices))]) for i, x in enumerate(indices)]
    full.permute(order)[tuple(grid)] = shard.permute(order)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: Places, group: context.Communicator) -> torch.Tensor:
        ctx.places, ctx.group = places, group
        shapes = []
        for rank in range(group.size):
            shape = list(x.shape)
            for dim, ranks in places:
                shape[dim] = sum(b - a for a, b in ranks[rank])
            shapes.append(shape)
        shards = group.all_gather(x, shapes)
        if len(places) == 1:
            dim, ranks = places[0]
            flat = [run for runs in ranks for run in runs]
            if all(len(r) == 1 for r in ranks) and all(a[1] == b[0] for a, b in pairwise(flat)):
                return torch.cat(shards, dim)
        full = x.new_empty(_global_shape(x.shape, places))
        for rank, shard in enumerate(shards):
            _put(full, shard, places, rank)
        return full

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        rank = ctx.group.rank
        grad = _take(grads[0], ctx.places, rank)
        for dim, ranks in ctx.places:  # an index that several ranks hold passes its gradient to the first
            shards = Shards(_size(ranks), tuple(IndexSet(s) for s in ranks))
            if not shards.disjoint and len(ctx.places) == 1:
                owned = np.isin(shards.ranks[rank].indices, shards.owned.ranks[rank].indices)
                shape = [-1 if d == dim else 1 for d in range(grad.dim())]
                grad = grad * torch.as_tensor(owned, device=grad.device, dtype=grad.dtype).view(shape)
        if len(ctx.places) > 1:
            grad = grad * _first_holder(ctx.places, rank, grad)
        return grad, None, None


def _first_holder(places: Places, rank: int, like: torch.Tensor) -> torch.Tensor:
    """1 where this rank is the lowest that holds an index of several split dims, else 0."""
    seen = np.zeros([_size(ranks) for _, ranks in places], dtype=bool)
    for earlier in range(rank):
        seen[np.ix_(*(IndexSet(ranks[earlier]).indices for _, ranks in places))] = True
    first = ~seen[np.ix_(*(IndexSet(ranks[rank]).indices for _, ranks in places))]
    dims = [d for d, _ in places]
    order = np.argsort(dims)
    shape = [first.shape[dims.index(d)] if d in dims else 1 for d in range(like.dim())]
    return torch.as_tensor(first.transpose(order).copy(), device=like.device, dtype=like.dtype).view(shape)


def all_gather(x: torch.Tensor, places: Places, group: str) -> torch.Tensor:
    """V -> I: the full value from the ranks' shards, on every rank.

    Args:
        x: the rank's shard.
        places: for each split dim, the dim and the runs of indices that each rank holds.
        group: the group's name.
    """
    return _AllGather.apply(x, places, context.current().group(group))


# Local moves ---------------------------------------------------------------------------------------


def narrow(x: torch.Tensor, dim: int, runs: Runs) -> torch.Tensor:
    """R -> V: the indices in ``runs`` of ``dim``. In backward, all other indices get a zero gradient."""
    parts = [x.narrow(dim, a, b - a) for a, b in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def take(x: torch.Tensor, dim: int, positions: Sequence[int]) -> torch.Tensor:
    """``x`` at local ``positions`` along ``dim``, in their order."""
    return x.index_select(dim, torch.tensor(positions, dtype=torch.int64, device=x.device))
