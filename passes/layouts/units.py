"""units: the indices that must stay together, found by union-find over labels.

Every index of every static dim carries a *label*. Ops unite labels: the label of row 7 of an
``up_proj`` is also that of neuron 7 of its output, of the activation, and of column 7 of
``down_proj``. An op that mixes indices (softmax over a dim, a product over head features) unites
their labels. A set of united labels is a *unit*: one head with all its rows of q, k and v, one neuron,
one word of the vocabulary. A *class* is the set of units that share a dim.

Where several indices read one (query heads a key-value head, all heads a norm weight), the labels are
not united. The source only *serves* its users: it must be on every rank that holds one of them. That is
how replicated key-value heads arise.

The labels of a value are :class:`Factor` arrays over virtual dims (see :mod:`passes.layouts.axes`), so
that a fused ``(3, H, D)`` or ``(H, 3, D)`` is one array that views merely reshape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from passes.layouts.axes import Axes, Dim, Size, trivial_axes

__all__ = ["Factor", "Units", "Value", "components", "services_of"]


def components(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The lowest vertex of each vertex's component, in a graph of ``count`` vertices with edges ``a[i] - b[i]``.

    Hooking to the smaller root and pointer jumping, in numpy: a few passes over the edges (Shiloach
    and Vishkin, 1982).
    """
    parent = np.arange(count, dtype=np.int64)
    while a.size:
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(grand := parent[parent], parent):
            parent = grand
        a, b = parent[a], parent[b]  # only edges between roots are left
        differ = a != b
        a, b = a[differ], b[differ]
    return parent


def services_of(users: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The services whose user is one of ``units``: per service, its user's position in ``units``, and its own index.

    Args:
        users: the user of each service, ascending (see :meth:`Units.services`).
        units: distinct units.
    """
    starts, stops = np.searchsorted(users, units), np.searchsorted(users, units, side="right")
    counts = stops - starts
    positions = np.repeat(np.arange(units.size), counts)
    return positions, np.arange(positions.size) + np.repeat(starts - np.cumsum(counts) + counts, counts)


@dataclass(frozen=True, eq=False)
class Factor:
    """Labels over some virtual dims of a value: ``labels.shape`` is those dims' sizes, dims ascending."""

    dims: tuple[int, ...]
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Value:
    """A value's axes, and the labels on its virtual dims.

    A static virtual dim without labels is never split, or the value is the same at every index along it
    (an expanded dim).
    """

    axes: Axes
    factors: tuple[Factor, ...] = ()

    @property
    def sizes(self) -> Dim:
        """The sizes of all virtual dims, in order."""
        return tuple(size for dim in self.axes for size in dim)

    def offset(self, dim: int) -> int:
        """The first virtual dim of ``dim``."""
        return sum(len(sizes) for sizes in self.axes[:dim])

    def virtual(self, dim: int) -> range:
        """The virtual dims of ``dim``."""
        start = self.offset(dim)
        return range(start, start + len(self.axes[dim]))

    def refined(self, axes: Axes) -> Value:
        """The same value with its factors split into the finer ones of ``axes``."""
        if axes == self.axes:
            return self
        finer: list[list[int]] = []
        new = 0
        for old_dim, new_dim in zip(self.axes, axes, strict=True):
            pieces = list(new_dim)
            for size in old_dim:
                group, rest = [], size
                while not rest.is_one:
                    piece = pieces.pop(0)
                    over = rest.over(piece)
                    assert over is not None, (self.axes, axes)
                    rest = over
                    group.append(new)
                    new += 1
                finer.append(group)
        sizes = [s for dim in axes for s in dim]
        factors = []
        for factor in self.factors:
            dims = tuple(v for d in factor.dims for v in finer[d])
            factors.append(Factor(dims, factor.labels.reshape([sizes[v].number for v in dims])))
        return Value(axes, tuple(factors))

    def merged(self, dim: int, units: Units) -> Value | None:
        """The same value with the factors of ``dim`` multiplied into one; None if one of them is symbolic."""
        sizes = self.axes[dim]
        if len(sizes) <= 1:
            return self if all(s.static for s in sizes) else None
        if not all(s.static for s in sizes):
            return None
        inside = set(self.virtual(dim))
        first, count = min(inside), len(inside)
        total = Size(int(np.prod([s.number for s in sizes])))
        axes = self.axes[:dim] + ((total,),) + self.axes[dim + 1 :]

        def renumber(v: int) -> int:
            return v if v < first else v - count + 1

        factors: list[Factor] = []
        carrier: Factor | None = None
        for factor in self.factors:
            touched = [v for v in factor.dims if v in inside]
            if not touched:
                factors.append(Factor(tuple(renumber(v) for v in factor.dims), factor.labels))
                continue
            if carrier is not None:  # two separate labellings of one dim: only the first can be split
                units.unite_all(factor.labels)
                continue
            carrier = factor
            outside_before = [v for v in factor.dims if v < first]
            outside_after = [v for v in factor.dims if v >= first + count]
            labels = factor.labels
            for position, v in enumerate(sorted(inside)):  # broadcast over the merged dims that this factor lacks
                if v not in touched:
                    labels = np.expand_dims(labels, len(outside_before) + position)
            shape = labels.shape
            full = shape[: len(outside_before)] + tuple(s.number for s in sizes) + shape[len(outside_before) + count :]
            labels = np.broadcast_to(labels, full).reshape(
                shape[: len(outside_before)] + (total.number,) + shape[len(outside_before) + count :]
            )
            dims = tuple(outside_before) + (first,) + tuple(renumber(v) for v in outside_after)
            factors.append(Factor(dims, labels))
        return Value(axes, tuple(factors))


@dataclass
class Units:
    """The labels of a graph, which of them are united, and which serve which."""

    count: int = 0
    _united: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _served: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def fresh(self, shape: Sequence[int]) -> np.ndarray:
        """New labels, one for each index of an array of this shape."""
        size = int(np.prod(shape))
        labels = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return labels

    def labelled(self, shape: Sequence[Size]) -> Value:
        """A value of this shape with new labels on each static dim longer than one."""
        axes = trivial_axes(shape)
        sizes = [s for dim in axes for s in dim]
        return Value(axes, tuple(Factor((v,), self.fresh([s.number])) for v, s in enumerate(sizes) if s.static))

    def unite(self, first: np.ndarray, second: np.ndarray) -> None:
        """Unite labels pairwise (arrays broadcast)."""
        if first is second:
            return
        first, second = np.broadcast_arrays(first, second)
        differ = first != second
        if differ.any():
            self._united.append((first[differ], second[differ]))

    def unite_all(self, labels: np.ndarray) -> None:
        """Unite all labels of an array."""
        if labels.size > 1:
            self.unite(labels.reshape(-1)[1:], labels.reshape(-1)[:1])

    def unite_along(self, factor: Factor, dims: Iterable[int]) -> Factor | None:
        """Unite labels along virtual ``dims``, and return the factor over the other dims (None if there are none)."""
        positions = tuple(i for i, d in enumerate(factor.dims) if d in set(dims))
        labels = factor.labels
        if not positions:
            return factor
        heads = labels[tuple(slice(0, 1) if i in positions else slice(None) for i in range(labels.ndim))]
        self.unite(labels, heads)
        rest = tuple(d for i, d in enumerate(factor.dims) if i not in positions)
        return (
            Factor(rest, heads.reshape([n for i, n in enumerate(labels.shape) if i not in positions])) if rest else None
        )

    def serve(self, users: np.ndarray, source: np.ndarray) -> None:
        """Record that each label of ``source`` is needed on every rank that holds its user (arrays broadcast)."""
        users, source = np.broadcast_arrays(users, source)
        differ = users != source
        if differ.any():
            self._served.append((users[differ], source[differ]))

    def roots(self) -> np.ndarray:
        """The lowest label of each label's unit."""
        if not self._united:
            return np.arange(self.count, dtype=np.int64)
        pairs = (np.concatenate([x for x, _ in self._united]), np.concatenate([y for _, y in self._united]))
        return components(self.count, *pairs)

    def services(self, roots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The distinct ``(user unit, source unit)`` pairs, as two arrays; users ascending."""
        if not self._served:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        users = roots[np.concatenate([u for u, _ in self._served])]
        sources = roots[np.concatenate([s for _, s in self._served])]
        pairs = np.unique((users * self.count + sources)[users != sources])
        return pairs // self.count, pairs % self.count
