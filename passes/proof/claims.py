"""claims: what is known of a value of a rewritten program, on all ranks at once.

A claim names the expression of the dense model that a value stands for (:mod:`passes.proof.terms`), the indices that
each rank holds, and the kind of gradient that arrives at the value:

============  ======  ==============================================================================
gradient      type    the ranks' gradients of the value
============  ======  ==============================================================================
``complete``  I       each is the dense gradient, at the indices that the rank holds
``partial``   R       they add up to the dense gradient
``both``      V       complete and partial at once, as no two ranks hold the same index
``pending``   P       the value itself is a partial sum; each gradient is the dense gradient
``None``              no gradient flows here
============  ======  ==============================================================================

The types are those of ``spmd-types``. This file shares no code with the passes that write the program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np

from passes.layouts.axes import Size, product

__all__ = [
    "Claim",
    "Dim",
    "Factor",
    "Split",
    "Unproved",
    "common_dim",
    "dim_of",
    "is_disjoint",
    "is_partition",
    "is_unsplit",
    "local_size",
    "regroup",
    "split_of",
    "unsplit_dims",
]


class Unproved(Exception):  # noqa: N818 - no mistake of the user
    """A step that cannot be proved: what was expected, what was found, and the effect on the numbers."""

    def __init__(self, expected: str, found: str, effect: str) -> None:
        super().__init__(f"expected {expected}, found {found}: {effect}")
        self.expected, self.found, self.effect = expected, found, effect


@dataclass(frozen=True, eq=False)
class Split:
    """The indices, of ``size``, that each rank holds, in the rank's own order.

    Where values repeat (copies of a key head), ``value_ids`` gives each index the number of its value: indices of one
    number are interchangeable. Only :func:`split_of` makes splits; it returns the same object for equal ones.
    """

    size: int
    ranks: tuple[np.ndarray, ...]
    value_ids: np.ndarray | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of indices that each rank holds."""
        return tuple(len(indices) for indices in self.ranks)

    def __str__(self) -> str:
        return _split_text(self)


@lru_cache(maxsize=4096)
def _split_text(split: Split) -> str:
    def runs(indices: np.ndarray) -> str:
        ends = np.flatnonzero(np.diff(indices) != 1) + 1
        texts = [f"{run[0]}:{run[-1] + 1}" for run in np.split(indices, ends) if len(run)]
        return ",".join(texts[:4]) + (",..." if len(texts) > 4 else "") or "-"

    return " | ".join(runs(indices) for indices in split.ranks) + f" of {split.size}"


_SPLITS: dict[tuple[object, ...], Split] = {}


def split_of(size: int, ranks: Sequence[np.ndarray], value_ids: np.ndarray | None = None) -> Split | None:
    """The split with these index lists; None if every rank holds all indices in order."""
    everything = np.arange(size)
    if all(len(indices) == size and np.array_equal(indices, everything) for indices in ranks):
        return None
    if value_ids is not None:
        value_ids = np.unique(value_ids, return_inverse=True)[1]
        value_ids = None if int(value_ids.max(initial=0)) + 1 == size else value_ids
    lists = tuple(np.ascontiguousarray(indices, dtype=np.int64) for indices in ranks)
    key = (size, tuple(indices.tobytes() for indices in lists), None if value_ids is None else value_ids.tobytes())
    if key not in _SPLITS:
        _SPLITS[key] = Split(size, lists, value_ids)
    return _SPLITS[key]


Factor = tuple[Size, Split | None]
Dim = tuple[Factor, ...]
"""A dim as a product of factors, the outermost first: symbolic ones, which are never split, and static ones. Two
static factors are never neighbours: they are one."""


@lru_cache(maxsize=4096)
def _merge_factors(factors: tuple[Factor, ...]) -> Factor:
    """The product of static factors, as one factor."""
    size = product(s for s, _ in factors)
    splits = [s for _, s in factors if s is not None]
    if len(factors) == 1 or not splits:
        return size, splits[0] if splits else None
    ranks = []
    for rank in range(len(splits[0].ranks)):
        flat = np.zeros(1, dtype=np.int64)
        for factor, split in factors:
            inner = np.arange(factor.number) if split is None else split.ranks[rank]
            flat = (flat[:, None] * factor.number + inner).reshape(-1)
        ranks.append(flat)
    value_ids = None
    if any(s.value_ids is not None for s in splits):
        value_ids = np.zeros(1, dtype=np.int64)
        for factor, split in factors:
            inner = np.arange(factor.number) if split is None or split.value_ids is None else split.value_ids
            value_ids = (value_ids[:, None] * factor.number + inner).reshape(-1)
    return size, split_of(size.number, ranks, value_ids)


@lru_cache(maxsize=4096)
def _divide_factor(factor: Factor, first: int) -> tuple[Factor, Factor] | None:
    """A static factor as a product of two, the first of size ``first``.

    Returns:
        The two factors; None if the indices of some rank are no product of outer and inner indices.
    """
    split, second = factor[1], factor[0].number // first
    if split is None:
        return (Size(first), None), (Size(second), None)
    outer, inner = [], []
    for indices in split.ranks:
        pairs = np.stack(np.divmod(indices, second))
        rows, columns = pairs[0][:: max(1, _run_length(pairs[0]))], pairs[1][: max(1, _run_length(pairs[0]))]
        if not np.array_equal(indices, (rows[:, None] * second + columns).reshape(-1)):
            return None
        outer.append(rows)
        inner.append(columns)
    value_ids: list[np.ndarray | None] = [None, None]
    if split.value_ids is not None:
        table = split.value_ids.reshape(first, second)
        for axis in (0, 1):
            if (table == table.take([0], axis)).all():
                value_ids[axis] = np.zeros((first, second)[axis], dtype=np.int64)
    outer_split, inner_split = split_of(first, outer, value_ids[0]), split_of(second, inner, value_ids[1])
    return (Size(first), outer_split), (Size(second), inner_split)


def _run_length(values: np.ndarray) -> int:
    """How often the first value of an array repeats before another follows."""
    other = np.flatnonzero(values != values[0]) if len(values) else values
    return int(other[0]) if len(other) else len(values)


def dim_of(factors: Sequence[Factor]) -> Dim:
    """The dim with these factors, neighbours of one kind merged."""
    merged: list[Factor] = []
    for size, split in factors:
        if size.is_one:
            continue
        if merged and size.static and merged[-1][0].static:
            merged[-1] = _merge_factors((merged[-1], (size, split)))
        elif merged and not size.static and not merged[-1][0].static:
            merged[-1] = (merged[-1][0] * size, None)
        else:
            merged.append((size, split))
    return tuple(merged)


@lru_cache(maxsize=16384)
def local_size(dim: Dim, rank: int) -> Size:
    """The size of a dim on a rank."""
    return product(size if split is None else Size(split.counts[rank]) for size, split in dim)


def is_unsplit(dim: Dim) -> bool:
    """Whether every rank holds all indices of a dim."""
    return all(split is None for _, split in dim)


def unsplit_dims(shape: Sequence[Size]) -> tuple[Dim, ...]:
    """The dims of a replicated value."""
    return tuple(() if size.is_one else ((size, None),) for size in shape)


def regroup(dims: Sequence[Dim], shape: Sequence[Size]) -> tuple[Dim, ...] | None:
    """The dims of a view in another (global) shape; None if a new dim's boundary cuts a split factor.

    Leading and trailing dims that stay as they are keep their splits; the factors between them are dealt out anew.
    """
    sizes = [product(size for size, _ in dim) for dim in dims]
    if not any(split for dim in dims for _, split in dim):
        return tuple(() if s.is_one else ((s, None),) for s in shape)
    head = 0
    while head < min(len(sizes), len(shape)) and sizes[head] == shape[head]:
        head += 1
    tail = 0
    while tail < min(len(sizes), len(shape)) - head and sizes[-1 - tail] == shape[len(shape) - 1 - tail]:
        tail += 1
    between = shape[head : len(shape) - tail]
    inside = dims[head : len(dims) - tail]
    if all(is_unsplit(dim) for dim in inside):  # unsplit dims may be regrouped in any way
        middle: list[Dim] = [() if s.is_one else ((s, None),) for s in between]
    else:
        left, middle, renamed = [f for dim in inside for f in dim], [], False
        for target in between:
            group: list[Factor] = []
            while not target.is_one:
                if not left:
                    return None
                size, split = left.pop(0)
                rest = target.over(size)
                if rest is None and not size.static and split is None and (more := size.over(target)) is not None:
                    left.insert(0, (more, None))  # an unsplit size may be factored in any order
                    size, rest = target, Size(1)
                if rest is None and not (size.static or target.static or split or renamed):
                    size, rest, renamed = (
                        target,
                        Size(1),
                        True,
                    )  # the same size under another symbol, if all others agree
                if rest is None:
                    if not (size.static and target.static and size.number % target.number == 0):
                        return None
                    pair = _divide_factor((size, split), target.number)
                    if pair is None:
                        return None
                    (size, split), second = pair
                    left.insert(0, second)
                    rest = Size(1)
                group.append((size, split))
                target = rest
            middle.append(dim_of(group))
        if left:
            return None
    return (*dims[:head], *middle, *dims[len(dims) - tail :])


def common_dim(first: Dim, second: Dim) -> Dim | None:
    """The dim that an op reads from two operands index by index; None if the operands hold different indices."""
    if first == second or (is_unsplit(first) and is_unsplit(second)):
        return first
    if len(first) != len(second):
        return None
    common = []
    for (size, left), (other_size, right) in zip(first, second, strict=True):
        if left is right:
            common.append((size, left))
        elif left is None or right is None or size != other_size:
            return None
        elif left.value_ids is not None and _have_same_values(left, right):
            common.append((size, right))
        elif right.value_ids is not None and _have_same_values(right, left):
            common.append((size, left))
        else:
            return None
    return tuple(common)


@lru_cache(maxsize=4096)
def _have_same_values(copies: Split, split: Split) -> bool:
    """Whether every rank holds, of ``copies``, the values at its indices of ``split``."""
    value_ids = copies.value_ids
    assert value_ids is not None
    return all(
        len(a) == len(b) and np.array_equal(value_ids[a], value_ids[b])
        for a, b in zip(copies.ranks, split.ranks, strict=True)
    )  # fmt: skip


@lru_cache(maxsize=4096)
def is_disjoint(splits: tuple[Split, ...]) -> bool:
    """Whether no index of the product of splits is held by two ranks, or twice by one rank."""
    if any(len(np.unique(indices)) < len(indices) for split in splits for indices in split.ranks):
        return False
    pairs = combinations(range(len(splits[0].ranks)), 2) if splits else []
    return bool(splits) and all(
        any(not np.intersect1d(split.ranks[a], split.ranks[b]).size for split in splits) for a, b in pairs
    )


@lru_cache(maxsize=4096)
def is_partition(splits: tuple[Split, ...]) -> bool:
    """Whether every index of the product of splits is held by exactly one rank, once."""
    total = math.prod(split.size for split in splits)
    held = sum(math.prod(split.counts[r] for split in splits) for r in range(len(splits[0].ranks)))
    return held == total and is_disjoint(splits)


@dataclass(frozen=True)
class Claim:
    """The knowledge of one value on all ranks (see the module's docstring).

    Attributes:
        term: the expression of the dense model that the value stands for.
        dims: the indices of each dim that each rank holds.
        grad: the kind of gradient that arrives at the value.
        pending: whether the value is a partial sum.
        unweighted: for a sum over indices that several ranks hold: those indices. It becomes a partial sum when each
            rank's sum is multiplied by a weight such that every index counts once.
    """

    term: int
    dims: tuple[Dim, ...]
    grad: str | None = None
    pending: bool = False
    unweighted: Split | None = None

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits of all dims."""
        return tuple(split for dim in self.dims for _, split in dim if split is not None)

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the same, complete value."""
        return not self.pending and self.unweighted is None and not self.splits

    @property
    def disjoint(self) -> bool:
        """Whether the value is split, and no two ranks hold the same element."""
        return bool(self.splits) and is_disjoint(self.splits)

    def local(self, rank: int) -> tuple[Size, ...]:
        """The shape of the value on a rank."""
        return tuple(local_size(dim, rank) for dim in self.dims)

    def with_grad(self, grad: str | None) -> Claim:
        """The claim with this kind of gradient; ``both`` where no two ranks hold the same element."""
        if grad in ("complete", "partial") and self.disjoint:
            grad = "both"
        return replace(self, grad=grad)

    def __str__(self) -> str:
        if self.pending or self.unweighted is not None:
            return "a partial sum"
        layout = f"split ({'; '.join(map(str, self.splits))})" if self.splits else "replicated"
        gradients = {"complete": ", gradient complete", "partial": ", gradient a partial sum"}
        return layout + gradients.get(self.grad or "", "")
