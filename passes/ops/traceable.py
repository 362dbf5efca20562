"""traceable: the collectives of compiled programs, as ops that a compiler sees and leaves alone.

A compiler cannot look into a process group, nor ask a thread which context it runs in. So each collective is an op of
torch's library that declares the shape of its result. It names its group by a key that is the same in all threads: the
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

__all__ = ["TraceableCommunicator", "traced"]


_BY_HOST = "by host "
"""The prefix of a group's key if the host takes part in its collectives."""

_library = torch.library.Library("autotp", "FRAGMENT")


def _op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> tuple[Any, Any]:
    """An op, and its twin for groups whose collectives the host takes part in: a CUDA graph ends before it.

    They are defined without ``torch.library.custom_op``, whose checks cost more than a small collective.
    """
    name, _, rest = schema.partition("(")
    for op, tags in ((name, ()), (f"{name}_by_host", (torch.Tag.cudagraph_unsafe,))):
        _library.define(f"{op}({rest}", tags=(torch.Tag.pt2_compliant_tag, *tags))
        _library.impl(op, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"autotp::{op}", fake, lib=_library)
    return getattr(torch.ops.autotp, name).default, getattr(torch.ops.autotp, f"{name}_by_host").default


def _run_all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    total = context.registered(group).all_reduce(x.contiguous())
    return total.clone() if total.data_ptr() == x.data_ptr() else total  # a group of one rank returns its argument


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


class TraceableCommunicator:
    """A rank's end of a group (:class:`passes.ops.context.Communicator`) in a compiled program.

    Args:
        key: the group's key (:func:`passes.ops.context.register`), after ``by host`` if the host takes part.
        rank: the rank's number in the group.
        size: the number of ranks in the group.
    """

    def __init__(self, key: str, rank: int, size: int) -> None:
        self.key, self.rank, self.size, self.by_host = key, rank, size, key.startswith(_BY_HOST)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, all of one shape."""
        return _all_reduce(tensor, self.key)

    all_reduce_ = all_reduce

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The sum, at once: the compiler decides when it runs."""
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
    return collectives._AllReduce.apply(x, TraceableCommunicator(key, rank, size))


class _Gather(torch.autograd.Function):
    """:class:`passes.ops.collectives._AllGather` along one dim, from numbers that were computed before compilation."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, numbers: Any, group: TraceableCommunicator) -> torch.Tensor:
        dim, counts, pieces, ctx.own_runs, ctx.counted = numbers
        ctx.dim = dim
        shards = _all_gather(x, dim, counts, group.key)
        return shards if pieces is None else torch.cat([shards.narrow(dim, a, b - a) for a, b in pieces], dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        dim = ctx.dim
        grad = torch.cat([grads[0].narrow(dim, a, b - a) for a, b in ctx.own_runs], dim)
        if ctx.counted is not None:  # an index that several ranks hold passes its gradient to one of them
            grad = torch.cat([grad.narrow(dim, a, b - a) * int(counts) for a, b, counts in ctx.counted], dim)
        return grad, None, None


def all_gather(x: torch.Tensor, numbers: Any, key: str, rank: int, size: int) -> torch.Tensor:
    """:func:`passes.ops.all_gather`."""
    return _Gather.apply(x, numbers, TraceableCommunicator(key, rank, size))


def _gather_numbers(places: Any, rank: int) -> tuple[Any, ...]:
    """An all-gather along one dim in plain numbers.

    Returns:
        The dim; each rank's number of indices; the ranges of the shards, side by side, that make up the full value
        (None: all of them in order); this rank's runs; and the ranges of its shard, each with whether its gradient
        counts (None: all do).
    """
    ((dim, ranks),) = places
    shards = Shards(max(b for runs in ranks for _, b in runs), tuple(IndexSet(s) for s in ranks))
    flat = np.concatenate([s.indices for s in shards.ranks])
    _, first = np.unique(flat, return_index=True)  # where each index of the full value comes first
    pieces = None if len(first) == len(flat) and (np.diff(first) == 1).all() else _in_runs(first)
    counted = None
    if not shards.disjoint:
        counts = np.isin(shards.ranks[rank].indices, shards.owned.ranks[rank].indices)
        edges = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(counts)]
        counted = tuple((a, b, bool(counts[a])) for a, b in pairwise(edges) if b > a)
    return dim, shards.counts, pieces, ranks[rank], counted


def _in_runs(positions: Any) -> tuple[tuple[int, int], ...]:
    """Positions as runs, in their order."""
    edges = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
    return tuple((int(positions[a]), int(positions[b - 1]) + 1) for a, b in pairwise(edges))


def enter(x: Any, key: str, rank: int, size: int) -> Any:
    """:func:`passes.ops.enter`."""
    tensors = collectives._Enter.apply(TraceableCommunicator(key, rank, size), *(x if isinstance(x, tuple) else (x,)))
    return tensors if isinstance(x, tuple) else tensors[0]


def broadcast_from_first(x: torch.Tensor, key: str, rank: int, size: int) -> torch.Tensor:
    """:func:`passes.ops.broadcast_from_first`."""
    return collectives._BroadcastFromFirst.apply(x, TraceableCommunicator(key, rank, size))


def enter_overlapping(x: torch.Tensor, places: Any, key: str, rank: int, size: int) -> torch.Tensor:
    """:func:`passes.ops.enter_overlapping`."""
    return collectives._EnterOverlapping.apply(x, places, TraceableCommunicator(key, rank, size))


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, options: Any, key: str, rank: int, size: int, weight: Any
) -> torch.Tensor:
    """:func:`passes.ops.vocabulary.vocab_parallel_cross_entropy`."""
    group = TraceableCommunicator(key, rank, size)
    return vocabulary.cross_entropy_over(logits, target, vocabulary.LossOptions(*options), group, weight)


def norm_over_shards(
    x: torch.Tensor, weight: Any, bias: Any, eps: float | None, counts: Any, centered: bool, key: str, rank: int,
    size: int,
) -> torch.Tensor:  # fmt: skip
    """:func:`passes.ops.norms.norm_over_shards`."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    group = TraceableCommunicator(key, rank, size)
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


def traced(graphs: Sequence[fx.Graph], parallel_context: context.ParallelContext) -> bool:
    """Replace the ops by which ranks communicate by ops that a compiler can see.

    Args:
        graphs: a rank's graph, and those that it calls; changed in place.
        parallel_context: the context in which they will run.

    Returns:
        Whether the graphs can be compiled; if not, nothing is changed. They cannot if they draw random numbers, whose
        streams no compiler knows, or gather shards that are split along several dims.
    """
    nodes = [n for graph in graphs for n in graph.nodes]
    drawing = (random.random_same, random.random_per_rank)
    if any(n.target in drawing or (n.target is collectives.all_gather and len(n.args[1]) > 1) for n in nodes):
        return False
    for node in nodes:
        if node.target not in _TRACEABLE:
            continue
        target, at = _TRACEABLE[node.target], COLLECTIVES[node.target].group
        group = parallel_context.group(node.args[at])
        key = (_BY_HOST if group.by_host else "") + context.register(parallel_context, node.args[at])
        before, after = list(node.args[:at]), node.args[at + 1 :]
        if node.target is collectives.all_gather:
            before[1] = _gather_numbers(before[1], group.rank)
        elif node.target is vocabulary.vocab_parallel_cross_entropy:
            weight, label_smoothing = after
            before[2:], after = [(*before[2:], label_smoothing)], (weight,)
        node.target, node.args = target, (*before, key, group.rank, group.size, *after)
    return True
