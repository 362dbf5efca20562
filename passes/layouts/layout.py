"""layout: which indices of each dim every rank holds.

A layout is an exact statement. For each split dim it gives, per rank, the sorted set of global
indices that the rank holds; of every other dim each rank holds all. With ``I_r`` for the set of rank ``r``,

    local_r = global[np.ix_(I_r^0, I_r^1, ...)]

Uneven shards, fused projections (several blocks a rank) and replicated key-value heads
(overlapping sets) are all just index sets; nothing here treats them as special.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["WHOLE", "IndexSet", "Layout", "Shards"]


@dataclass(frozen=True)
class IndexSet:
    """A sorted set of indices, kept as maximal half-open runs.

    >>> IndexSet.of([0, 1, 2, 7]).runs
    ((0, 3), (7, 8))
    """

    runs: tuple[tuple[int, int], ...]

    @staticmethod
    def of(indices: Iterable[int] | np.ndarray) -> IndexSet:
        """The set of these indices, which may come in any order and repeat."""
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter(indices, dtype=np.int64)
        values = np.unique(indices)
        if values.size == 0:
            return IndexSet(())
        cuts = np.flatnonzero(np.diff(values) != 1)
        starts = np.concatenate(([0], cuts + 1))
        stops = np.concatenate((cuts, [values.size - 1]))
        return IndexSet(tuple((int(values[a]), int(values[b]) + 1) for a, b in zip(starts, stops, strict=True)))

    @staticmethod
    def full(size: int) -> IndexSet:
        """All of ``0 .. size - 1``."""
        return IndexSet(((0, size),)) if size else IndexSet(())

    @cached_property
    def indices(self) -> np.ndarray:
        """The indices as a sorted int64 array."""
        if not self.runs:
            return np.empty(0, dtype=np.int64)
        return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in self.runs])

    def __len__(self) -> int:
        return sum(b - a for a, b in self.runs)

    def positions(self, subset: IndexSet) -> IndexSet:
        """The positions of ``subset``'s members in this set's order.

        Raises:
            ValueError: ``subset`` has an index that this set lacks.
        """
        result = np.searchsorted(self.indices, subset.indices)
        if result.size and (result.max() >= len(self) or not np.array_equal(self.indices[result], subset.indices)):
            raise ValueError(f"{subset} is not a subset of {self}")
        return IndexSet.of(result)

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in self.runs) or "-"


@dataclass(frozen=True)
class Shards:
    """One split dim: its global ``size`` and the index set of each rank.

    The sets cover the dim; they may be uneven, in several runs, and may overlap.
    """

    size: int
    ranks: tuple[IndexSet, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The local size on each rank."""
        return tuple(len(s) for s in self.ranks)

    @cached_property
    def disjoint(self) -> bool:
        """Whether every index is held by exactly one rank."""
        return sum(self.counts) == self.size

    @cached_property
    def covers(self) -> bool:
        """Whether every index is held by some rank, and every rank holds something."""
        return all(self.counts) and len(IndexSet.of(np.concatenate([s.indices for s in self.ranks]))) == self.size

    @cached_property
    def owned(self) -> Shards:
        """The same dim, each index only on the lowest rank that holds it."""
        seen = np.zeros(self.size, dtype=bool)
        sets = []
        for s in self.ranks:
            new = s.indices[~seen[s.indices]]
            seen[new] = True
            sets.append(IndexSet.of(new))
        return Shards(self.size, tuple(sets))

    def contains(self, other: Shards) -> bool:
        """Whether each rank's set in ``other`` is a subset of its set here."""
        return self.size == other.size and all(
            np.isin(b.indices, a.indices, assume_unique=True).all()
            for a, b in zip(self.ranks, other.ranks, strict=True)
        )

    @cached_property
    def replicas(self) -> tuple[tuple[int, ...], ...] | None:
        """The ranks grouped by equal sets; None if two groups' sets overlap."""
        groups: dict[IndexSet, list[int]] = {}
        for rank, s in enumerate(self.ranks):
            groups.setdefault(s, []).append(rank)
        if sum(len(s) for s in groups) != self.size:
            return None
        return tuple(tuple(g) for g in groups.values())

    def __str__(self) -> str:
        return " | ".join(str(s) for s in self.ranks)


@dataclass(frozen=True)
class Layout:
    """A value's split dims; a value with none is replicated.

    ``shards`` holds ``(dim, Shards)`` pairs in dim order. Whether a value is a partial sum is not
    part of the layout but of its type (:class:`passes.layouts.sharded_value.ShardedValue`): no dim of a
    partial sum is split.
    """

    shards: tuple[tuple[int, Shards], ...] = ()

    @staticmethod
    def of(shards: dict[int, Shards]) -> Layout:
        """The layout with these split dims."""
        return Layout(tuple(sorted(shards.items())))

    @property
    def whole(self) -> bool:
        """Whether no dim is split."""
        return not self.shards

    @property
    def dims(self) -> dict[int, Shards]:
        """The split dims as a dict."""
        return dict(self.shards)

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """The shape of ``rank``'s shard of a value with this global shape."""
        local = list(shape)
        for dim, shards in self.shards:
            local[dim] = len(shards.ranks[rank])
        return tuple(local)

    def __str__(self) -> str:
        if self.whole:
            return "whole"
        return "; ".join(f"dim {dim}: {shards}" for dim, shards in self.shards)


WHOLE = Layout()
