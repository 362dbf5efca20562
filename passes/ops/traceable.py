"""traced: how ranks meet in a program that is compiled: through ops that a compiler sees and leaves as they are.

A compiler cannot look into a process group, nor ask a thread which context it runs in. So each exchange is an op of
torch's library, with the shapes of its result, and names its group by a key that is the same in all threads: the
number of a context and the group's name in it (:func:`passes.ops.context.register`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.autograd.function import once_differentiable

from passes.layouts.layout import IndexSet, Shards
from passes.ops import collectives, context, norms, random, vocabulary
from passes.ops.registry import COLLECTIVES

__all__ = ["Traced", "traced"]


_BY_HOST = "by host "
"""What the key of a group begins with in whose exchanges the host takes part."""

_library = torch.library.Library("autotp", "FRAGMENT")


def _op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> tuple[Any, Any]:
    """An op, and the same for groups that meet by the host: a CUDA graph is cut there.

    They are defined without ``torch.library.custom_op``, whose checks cost more than a small exchange.
    """
    name, _, rest = schema.partition("(")
    for each, tags in ((name, ()), (f"{name}_by_host", (torch.Tag.cudagraph_unsafe,))):
        _library.define(f"{each}({rest}", tags=(torch.Tag.pt2_compliant_tag, *tags))
        _library.impl(each, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"autotp::{each}", fake, lib=_library)
    return getattr(torch.ops.autotp, name).default, getattr(torch.ops.autotp, f"{name}_by_host").default


def _run_all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    found = context.registered(group).all_reduce(x.contiguous())
    return found.clone() if found.data_ptr() == x.data_ptr() else found  # a rank by itself gives back its own


def _run_all_gather(x: torch.Tensor, dim: int, counts: Sequence[int], group: str) -> torch.Tensor:
    shapes = [[*x.shape[:dim], count, *x.shape[dim + 1 :]] for count in counts]
    return torch.cat(context.registered(group).all_gather(x.contiguous(), shapes), dim)


_ALL_REDUCE = _op("all_reduce(Tensor x, str group) -> Tensor", _run_all_reduce, lambda x, group: x.new_empty(x.shape))
_ALL_GATHER = _op(
    "all_gather(Tensor x, int dim, SymInt[] counts, str group) -> Tensor",
    _run_all_gather,
    lambda x, dim, counts, group: x.new_empty([*x.shape[:dim], sum(counts), *x.shape[dim + 1 :]]),
)


def _all_reduce(x: torch.Tensor, key: str) -> torch.Tensor:
    result: torch.Tensor = _ALL_REDUCE[int(key.startswith(_BY_HOST))](x, key.removeprefix(_BY_HOST))
    return result


def _all_gather(x: torch.Tensor, dim: int, counts: Sequence[int], key: str) -> torch.Tensor:
    result: torch.Tensor = _ALL_GATHER[int(key.startswith(_BY_HOST))](x, dim, counts, key.removeprefix(_BY_HOST))
    return result


class Traced:
    """A rank's end of a group (:class:`passes.ops.context.Communicator`) in a compiled program.

    Args:
        key: the group's (:func:`passes.ops.context.register`), after ``by host``, if it meets so.
        rank: the rank's number in the group.
        size: how many there are.
    """

    def __init__(self, key: str, rank: int, size: int) -> None:
        self.key, self.rank, self.size, self.by_host = key, rank, size, key.startswith(_BY_HOST)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, all of one shape."""
        return _all_reduce(tensor, self.key)

    all_reduce_ = all_reduce

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The sum, at once: where it runs is the compiler's to say."""
        total = self.all_reduce(tensor)
        return lambda: total

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The ranks' tensors in rank order; ``shapes`` may differ in one dim."""
        differing = [
            d for d in range(tensor.dim()) if any(s[d] is not shapes[0][d] and s[d] != shapes[0][d] for s in shapes)
        ]
        dim = differing[0] if differing else 0
        counts = [s[dim] for s in shapes]
        return list(_all_gather(tensor, dim, counts, self.key).split(counts, dim))


def all_reduce(x: torch.Tensor, key: str, rank: int, size: int) -> torch.Tensor:
    """:func:`passes.ops.all_reduce`."""
    return collectives._AllReduce.apply(x, Traced(key, rank, size))


class _Gather(torch.autograd.Function):
    """:class:`passes.ops._AllGather` along one dim, all that it must know of the ranks' indices worked out before."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, how: Any, group: Traced) -> torch.Tensor:
        dim, counts, pieces, ctx.mine, ctx.kept = how
        ctx.dim = dim
        joined = _all_gather(x, dim, counts, group.key)
        return joined if pieces is None else torch.cat([joined.narrow(dim, a, b - a) for a, b in pieces], dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        dim = ctx.dim
        own = torch.cat([grads[0].narrow(dim, a, b - a) for a, b in ctx.mine], dim)
        if ctx.kept is not None:  # of what several ranks hold one passes the gradient on
            parts = [own.narrow(dim, a, b - a) * int(keep) for a, b, keep in ctx.kept]
            own = torch.cat(parts, dim)
        return own, None, None


def all_gather(x: torch.Tensor, how: Any, key: str, rank: int, size: int) -> torch.Tensor:
    """:func:`passes.ops.all_gather`."""
    return _Gather.apply(x, how, Traced(key, rank, size))


def _how(places: Any, rank: int) -> tuple[Any, ...]:
    """A gather in plain numbers: the dim, how much each rank holds, the pieces of what they hold, one after another,
    that make up the whole (None: all of it), this rank's runs, and its own runs with whether they count."""
    ((dim, sets),) = places
    held = Shards(max(b for each in sets for _, b in each), tuple(IndexSet(s) for s in sets))
    flat = np.concatenate([s.indices for s in held.ranks])
    _, first = np.unique(flat, return_index=True)  # where each index of the whole is held first
    pieces = None if len(first) == len(flat) and (np.diff(first) == 1).all() else _in_runs(first)
    kept = None
    if not held.disjoint:
        counts = np.isin(held.ranks[rank].indices, held.owned.ranks[rank].indices)
        edges = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(counts)]
        kept = tuple((a, b, bool(counts[a])) for a, b in pairwise(edges) if b > a)
    return dim, held.counts, pieces, sets[rank], kept


def _in_runs(positions: Any) -> tuple[tuple[int, int], ...]:
    """Positions, in their order, as runs."""
    edges = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
    return tuple((int(positions[a]), int(positions[b - 1]) + 1) for a, b in pairwise(edges))


def enter(x: Any, key: str, rank: int, size: int) -> Any:
    """:func:`passes.ops.enter`."""
    tensors = collectives._Enter.apply(Traced(key, rank, size), *(x if isinstance(x, tuple) else (x,)))
    return tensors if isinstance(x, tuple) else tensors[0]


def broadcast_from_first(x: torch.Tensor, key: str, rank: int, size: int) -> torch.Tensor:
    """:func:`passes.ops.broadcast_from_first`."""
    return collectives._BroadcastFromFirst.apply(x, Traced(key, rank, size))


def enter_overlapping(x: torch.Tensor, places: Any, key: str, rank: int, size: int) -> torch.Tensor:
    """:func:`passes.ops.enter_overlapping`."""
    return collectives._EnterOverlapping.apply(x, places, Traced(key, rank, size))


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, options: Any, key: str, rank: int, size: int, weight: Any
) -> torch.Tensor:
    """:func:`passes.ops.vocabulary.vocab_parallel_cross_entropy`."""
    group = Traced(key, rank, size)
    return vocabulary.cross_entropy_over(logits, target, vocabulary.LossOptions(*options), group, weight)


def norm_over_shards(
    x: torch.Tensor, weight: Any, bias: Any, eps: float | None, counts: Any, centered: bool, key: str, rank: int,
    size: int,
) -> torch.Tensor:  # fmt: skip
    """:func:`passes.ops.norms.norm_over_shards`."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    group = Traced(key, rank, size)
    return norms._Norm.apply(x, weight, bias, eps, tuple(counts), centered, group)


_TRACEABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    collectives.all_reduce: all_reduce,
    collectives.all_gather: all_gather,
    collectives.enter: enter,
    collectives.broadcast_from_first: broadcast_from_first,
    collectives.enter_overlapping: enter_overlapping,
    vocabulary.vocab_parallel_cross_entropy: cross_entropy,
    norms.norm_over_shards: norm_over_shards,
}
"""For each op by which ranks communicate, the op that can be compiled."""


def traced(graphs: Sequence[fx.Graph], of: context.ParallelContext) -> bool:
    """Let ranks meet through ops that a compiler can see.

    Args:
        graphs: a rank's graph, and those that it calls; changed in place.
        of: the context in which they will run.

    Returns:
        Whether they can be compiled: not, and nothing is changed, if they draw random numbers, which ranks draw alike
        or apart from streams that no compiler knows, or if shards differ in several dims.
    """
    nodes = [n for graph in graphs for n in graph.nodes]
    drawing = (random.random_same, random.random_per_rank)
    if any(n.target in drawing or (n.target is collectives.all_gather and len(n.args[1]) > 1) for n in nodes):
        return False
    for node in nodes:
        if node.target not in _TRACEABLE:
            continue
        target, at = _TRACEABLE[node.target], COLLECTIVES[node.target].group
        group = of.group(node.args[at])
        key = (_BY_HOST if group.by_host else "") + context.register(of, node.args[at])
        before, after = list(node.args[:at]), node.args[at + 1 :]
        if node.target is collectives.all_gather:
            before[1] = _how(before[1], group.rank)
        elif node.target is vocabulary.vocab_parallel_cross_entropy:
            weight, label_smoothing = after
            before[2:], after = [(*before[2:], label_smoothing)], (weight,)
        node.target, node.args = target, (*before, key, group.rank, group.size, *after)
    return True
