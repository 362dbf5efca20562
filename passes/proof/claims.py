"""Claims: what is known of a value of a rewritten program, on all ranks at once.

A claim says which expression of the dense model a value stands for (:mod:`passes.proof.terms`), which of
its indices each rank holds, and what the gradient that arrives at it is worth:

============  ======  ==============================================================================
gradient      type    the ranks' gradients of the value
============  ======  ==============================================================================
``complete``  I       each is the dense one, at the indices that the rank holds
``partial``   R       they add up to the dense one
``both``      V       no index has two holders, so that the two are one
``pending``   P       the value itself is in parts that add up; each gradient is the dense one
``None``              no gradient flows here
============  ======  ==============================================================================

The types are those of ``spmd-types``. Nothing here is shared with the passes that make the program.
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
    "agreed",
    "counted_once",
    "dim_of",
    "held_once",
    "is_whole",
    "local_size",
    "regrouped",
    "split_of",
    "wholly",
]


class Unproved(Exception):  # noqa: N818 - no mistake of the user
    """A step that cannot be proved: what was expected, what was found, and what that does to the numbers."""

    def __init__(self, expected: str, found: str, effect: str) -> None:
        super().__init__(f"expected {expected}, found {found}: {effect}")
        self.expected, self.found, self.effect = expected, found, effect


@dataclass(frozen=True, eq=False)
class Split:
    """Which of ``size`` indices each rank holds, in the order in which it holds them.

    Where values repeat (copies of a key head), ``same`` numbers the indices by their value, and indices with
    the same number stand for each other. Made by :func:`split_of` only, which gives equal ones the same object.
    """

    size: int
    ranks: tuple[np.ndarray, ...]
    same: np.ndarray | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """How many each rank holds."""
        return tuple(len(each) for each in self.ranks)

    def __str__(self) -> str:
        return _spelled(self)


@lru_cache(maxsize=4096)
def _spelled(split: Split) -> str:
    def runs(each: np.ndarray) -> str:
        cuts = np.flatnonzero(np.diff(each) != 1) + 1
        parts = [f"{p[0]}:{p[-1] + 1}" for p in np.split(each, cuts) if len(p)]
        return ",".join(parts[:4]) + (",..." if len(parts) > 4 else "") or "-"

    return " | ".join(runs(each) for each in split.ranks) + f" of {split.size}"


_SPLITS: dict[tuple[object, ...], Split] = {}


def split_of(size: int, ranks: Sequence[np.ndarray], same: np.ndarray | None = None) -> Split | None:
    """The split with these index lists; None if every rank holds everything in order."""
    everything = np.arange(size)
    if all(len(each) == size and np.array_equal(each, everything) for each in ranks):
        return None
    if same is not None:
        same = np.unique(same, return_inverse=True)[1]
        same = None if int(same.max(initial=0)) + 1 == size else same
    lists = tuple(np.ascontiguousarray(each, dtype=np.int64) for each in ranks)
    key = (size, tuple(each.tobytes() for each in lists), None if same is None else same.tobytes())
    if key not in _SPLITS:
        _SPLITS[key] = Split(size, lists, same)
    return _SPLITS[key]


Factor = tuple[Size, Split | None]
Dim = tuple[Factor, ...]
"""A dim: symbolic factors, which are whole, between static ones; no two static ones side by side."""


@lru_cache(maxsize=4096)
def _merged(factors: tuple[Factor, ...]) -> Factor:
    """Static factors as one."""
    size = product(s for s, _ in factors)
    splits = [s for _, s in factors if s is not None]
    if len(factors) == 1 or not splits:
        return size, splits[0] if splits else None
    ranks = []
    for rank in range(len(splits[0].ranks)):
        flat = np.zeros(1, dtype=np.int64)
        for each, split in factors:
            inner = np.arange(each.number) if split is None else split.ranks[rank]
            flat = (flat[:, None] * each.number + inner).reshape(-1)
        ranks.append(flat)
    same = None
    if any(s.same is not None for s in splits):
        same = np.zeros(1, dtype=np.int64)
        for each, split in factors:
            inner = np.arange(each.number) if split is None or split.same is None else split.same
            same = (same[:, None] * each.number + inner).reshape(-1)
    return size, split_of(size.number, ranks, same)


@lru_cache(maxsize=4096)
def _parted(factor: Factor, first: int) -> tuple[Factor, Factor] | None:
    """A static factor as two, the first of this size; None where what some rank holds is no product."""
    split, second = factor[1], factor[0].number // first
    if split is None:
        return (Size(first), None), (Size(second), None)
    outer, inner = [], []
    for each in split.ranks:
        pairs = np.stack(np.divmod(each, second))
        rows, columns = pairs[0][:: max(1, _run(pairs[0]))], pairs[1][: max(1, _run(pairs[0]))]
        if not np.array_equal(each, (rows[:, None] * second + columns).reshape(-1)):
            return None
        outer.append(rows)
        inner.append(columns)
    same: list[np.ndarray | None] = [None, None]
    if split.same is not None:
        table = split.same.reshape(first, second)
        for axis in (0, 1):
            if (table == table.take([0], axis)).all():
                same[axis] = np.zeros((first, second)[axis], dtype=np.int64)
    one, two = split_of(first, outer, same[0]), split_of(second, inner, same[1])
    return (Size(first), one), (Size(second), two)


def _run(values: np.ndarray) -> int:
    """How long the first value of an array repeats."""
    other = np.flatnonzero(values != values[0]) if len(values) else values
    return int(other[0]) if len(other) else len(values)


def dim_of(factors: Sequence[Factor]) -> Dim:
    """A dim with its static neighbours merged."""
    found: list[Factor] = []
    for size, split in factors:
        if size.is_one:
            continue
        if found and size.static and found[-1][0].static:
            found[-1] = _merged((found[-1], (size, split)))
        elif found and not size.static and not found[-1][0].static:
            found[-1] = (found[-1][0] * size, None)
        else:
            found.append((size, split))
    return tuple(found)


@lru_cache(maxsize=16384)
def local_size(dim: Dim, rank: int) -> Size:
    """How much of a dim a rank holds."""
    return product(size if split is None else Size(split.counts[rank]) for size, split in dim)


def is_whole(dim: Dim) -> bool:
    """Whether every rank holds all of a dim."""
    return all(split is None for _, split in dim)


def wholly(shape: Sequence[Size]) -> tuple[Dim, ...]:
    """Dims of which every rank holds all."""
    return tuple(() if size.is_one else ((size, None),) for size in shape)


def regrouped(dims: Sequence[Dim], shape: Sequence[Size]) -> tuple[Dim, ...] | None:
    """What a view of another (global) shape holds; None where that cuts across what ranks hold."""
    was = [product(size for size, _ in dim) for dim in dims]
    if not any(split for dim in dims for _, split in dim):
        return tuple(() if s.is_one else ((s, None),) for s in shape)
    head = 0
    while head < min(len(was), len(shape)) and was[head] == shape[head]:
        head += 1
    tail = 0
    while tail < min(len(was), len(shape)) - head and was[-1 - tail] == shape[len(shape) - 1 - tail]:
        tail += 1
    between = shape[head : len(shape) - tail]
    inside = dims[head : len(dims) - tail]
    if all(is_whole(dim) for dim in inside):  # sizes that no rank divides may mix as they like
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
                    left.insert(0, (more, None))  # of what is whole any factor may come first
                    size, rest = target, Size(1)
                if rest is None and not (size.static or target.static or split or renamed):
                    size, rest, renamed = target, Size(1), True  # as many, in other words, if all else fits
                if rest is None:
                    if not (size.static and target.static and size.number % target.number == 0):
                        return None
                    parts = _parted((size, split), target.number)
                    if parts is None:
                        return None
                    (size, split), second = parts
                    left.insert(0, second)
                    rest = Size(1)
                group.append((size, split))
                target = rest
            middle.append(dim_of(group))
        if left:
            return None
    return (*dims[:head], *middle, *dims[len(dims) - tail :])


def agreed(first: Dim, second: Dim) -> Dim | None:
    """What two dims that are read index by index hold, if that is the same; None if not."""
    if first == second or (is_whole(first) and is_whole(second)):
        return first
    if len(first) != len(second):
        return None
    found = []
    for (size, one), (other, two) in zip(first, second, strict=True):
        if one is two:
            found.append((size, one))
        elif one is None or two is None or size != other:
            return None
        elif one.same is not None and _stand_for(one, two):
            found.append((size, two))
        elif two.same is not None and _stand_for(two, one):
            found.append((size, one))
        else:
            return None
    return tuple(found)


@lru_cache(maxsize=4096)
def _stand_for(copies: Split, split: Split) -> bool:
    """Whether what ranks hold of ``copies`` has the values at the indices of ``split``."""
    same = copies.same
    assert same is not None
    return all(
        len(a) == len(b) and np.array_equal(same[a], same[b])
        for a, b in zip(copies.ranks, split.ranks, strict=True)
    )  # fmt: skip


@lru_cache(maxsize=4096)
def held_once(splits: tuple[Split, ...]) -> bool:
    """Whether no index of the product of split factors is held by two ranks, or by one rank twice."""
    if any(len(np.unique(each)) < len(each) for split in splits for each in split.ranks):
        return False
    pairs = combinations(range(len(splits[0].ranks)), 2) if splits else []
    return bool(splits) and all(
        any(not np.intersect1d(split.ranks[a], split.ranks[b]).size for split in splits) for a, b in pairs
    )


@lru_cache(maxsize=4096)
def counted_once(splits: tuple[Split, ...]) -> bool:
    """Whether every index of the product of split factors is held by exactly one rank."""
    total = math.prod(split.size for split in splits)
    held = sum(math.prod(split.counts[r] for split in splits) for r in range(len(splits[0].ranks)))
    return held == total and held_once(splits)


@dataclass(frozen=True)
class Claim:
    """What is known of a value: see the module.

    Attributes:
        term: the expression of the dense model that it stands for.
        dims: which indices of each dim every rank holds.
        grad: what the gradient that arrives is worth.
        uncounted: for a sum over indices that several ranks hold, those indices: a pending sum once each is
            multiplied by how often it is to count.
    """

    term: int
    dims: tuple[Dim, ...]
    grad: str | None = None
    pending: bool = False
    uncounted: Split | None = None

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits of all dims."""
        return tuple(split for dim in self.dims for _, split in dim if split is not None)

    @property
    def whole(self) -> bool:
        """Whether every rank holds all of the value."""
        return not self.pending and self.uncounted is None and not self.splits

    @property
    def apart(self) -> bool:
        """Whether no two ranks hold the same element."""
        return bool(self.splits) and held_once(self.splits)

    def local(self, rank: int) -> tuple[Size, ...]:
        """The shape of what a rank holds."""
        return tuple(local_size(dim, rank) for dim in self.dims)

    def with_grad(self, grad: str | None) -> Claim:
        """The claim with this gradient; one that splits apart has ``both`` for either."""
        if grad in ("complete", "partial") and self.apart:
            grad = "both"
        return replace(self, grad=grad)

    def __str__(self) -> str:
        if self.pending or self.uncounted is not None:
            return "a pending sum"
        held = "whole" if not self.splits else f"split ({'; '.join(map(str, self.splits))})"
        worth = {"complete": ", gradient complete", "partial": ", gradient in parts"}
        return held + worth.get(self.grad or "", "")
