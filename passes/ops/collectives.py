"""collectives: the differentiable collectives of rewritten graphs.

Each collective is differentiable, and its backward is what its types say (DESIGN.md; the SPMD types
R, I, V, P of ``spmd-types``; *f* and *g* of Megatron-LM, https://arxiv.org/abs/1909.08053):

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
"""A collective that was begun: waits for its result, and gives it."""
Runs = tuple[tuple[int, int], ...]
Places = tuple[tuple[int, tuple[Runs, ...]], ...]


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
    """P -> I: the sum of the ranks' tensors, on every rank. The gradient passes as it is."""
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
    """The sum that was begun. Until then ranks must meet in nothing else."""
    return pending()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: context.Communicator, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)  # what no one asks the gradient of has none, as in the dense model
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
    """I -> R: where whole values enter computation on shards. Their gradients are summed over the group.

    Several values of one dtype may enter together; their gradients then travel in one all-reduce.
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
    """V -> I, of shards that each are the whole: the first rank's is everyone's, to the bit, and gets the gradient."""
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
        whole = grad.new_zeros(_global_shape(grad.shape, ctx.places))
        _put(whole, grad, ctx.places, group.rank)
        return _take(group.all_reduce(whole), ctx.places, group.rank), None, None


def enter_overlapping(x: torch.Tensor, places: Places, group: str) -> torch.Tensor:
    """For a shard that overlaps other ranks' without being equal to them: where they overlap the
    gradients are summed. ``places`` is as in :func:`all_gather`."""
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
        kept = torch.zeros_like(grads[0])
        for a, b in ctx.mine:
            kept.narrow(ctx.dim, a, b - a).copy_(grads[0].narrow(ctx.dim, a, b - a))
        return kept, None, None


def deduplicate_gradient(x: torch.Tensor, dim: int, mine: Runs) -> torch.Tensor:
    """A shard that overlaps other ranks' is given to the caller, whose gradient of it is the same on each of them:
    only that at the local positions ``mine`` along ``dim`` counts, which the runs of one rank hold of each index."""
    return _DeduplicateGradient.apply(x, dim, mine) if torch.is_grad_enabled() and x.requires_grad else x


def _indices(runs: Runs, device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(a, b, device=device) for a, b in runs])


def _global_shape(shape: Sequence[int], places: Places) -> list[int]:
    whole = list(shape)
    for dim, runs in places:
        whole[dim] = max(b for each in runs for _, b in each)
    return whole


def _take(whole: torch.Tensor, places: Places, rank: int) -> torch.Tensor:
    for dim, runs in places:
        whole = narrow(whole, dim, runs[rank])
    return whole


def _put(whole: torch.Tensor, part: torch.Tensor, places: Places, rank: int) -> None:
    """``whole[ix_(...)] = part`` for index sets on some dims."""
    dims = [d for d, _ in places]
    order = dims + [d for d in range(whole.dim()) if d not in dims]
    grids = [_indices(runs[rank], whole.device) for _, runs in places]
    shaped = [g.view([-1 if i == j else 1 for j in range(len(grids))]) for i, g in enumerate(grids)]
    whole.permute(order)[tuple(shaped)] = part.permute(order)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: Places, group: context.Communicator) -> torch.Tensor:
        ctx.places, ctx.group = places, group
        shapes = []
        for rank in range(group.size):
            shape = list(x.shape)
            for dim, runs in places:
                shape[dim] = sum(b - a for a, b in runs[rank])
            shapes.append(shape)
        parts = group.all_gather(x, shapes)
        if len(places) == 1:
            dim, sets = places[0]
            flat = [run for runs in sets for run in runs]
            if all(len(r) == 1 for r in sets) and all(a[1] == b[0] for a, b in pairwise(flat)):
                return torch.cat(parts, dim)
        whole = x.new_empty(_global_shape(x.shape, places))
        for rank, part in enumerate(parts):
            _put(whole, part, places, rank)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        rank = ctx.group.rank
        mine = _take(grads[0], ctx.places, rank)
        for dim, sets in ctx.places:  # an index that several ranks hold passes its gradient to the first
            held = Shards(max(b for each in sets for _, b in each), tuple(IndexSet(s) for s in sets))
            if not held.disjoint and len(ctx.places) == 1:
                keep = np.isin(held.ranks[rank].indices, held.owned.ranks[rank].indices)
                shape = [-1 if d == dim else 1 for d in range(mine.dim())]
                mine = mine * torch.as_tensor(keep, device=mine.device, dtype=mine.dtype).view(shape)
        if len(ctx.places) > 1:
            mine = mine * _first_holder(ctx.places, rank, mine)
        return mine, None, None


def _first_holder(places: Places, rank: int, like: torch.Tensor) -> torch.Tensor:
    """1 where this rank is the lowest that holds an index of several split dims, else 0."""
    sizes = [max(b for each in runs for _, b in each) for _, runs in places]
    held = np.zeros(sizes, dtype=bool)
    for earlier in range(rank):
        held[np.ix_(*(IndexSet(runs[earlier]).indices for _, runs in places))] = True
    mine = ~held[np.ix_(*(IndexSet(runs[rank]).indices for _, runs in places))]
    dims = [d for d, _ in places]
    order = np.argsort(dims)
    shape = [mine.shape[dims.index(d)] if d in dims else 1 for d in range(like.dim())]
    return torch.as_tensor(mine.transpose(order).copy(), device=like.device, dtype=like.dtype).view(shape)


def all_gather(x: torch.Tensor, places: Places, group: str) -> torch.Tensor:
    """V -> I: the whole value from the ranks' shards, on every rank.

    Args:
        x: the rank's shard.
        places: for each split dim, the dim and the runs of indices that each rank holds.
        group: the group's name.
    """
    return _AllGather.apply(x, places, context.current().group(group))


# Local moves ---------------------------------------------------------------------------------------


def narrow(x: torch.Tensor, dim: int, runs: Runs) -> torch.Tensor:
    """R -> V: the indices in ``runs`` of ``dim``; in backward the others' gradients are zero."""
    parts = [x.narrow(dim, a, b - a) for a, b in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def take(x: torch.Tensor, dim: int, positions: Sequence[int]) -> torch.Tensor:
    """``x`` at local ``positions`` along ``dim``, in their order."""
    return x.index_select(dim, torch.tensor(positions, dtype=torch.int64, device=x.device))
