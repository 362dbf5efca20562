"""relayout: the same layout stated on other factors of the same dims.

A view regroups factors (see :mod:`passes.layouts.axes`); what a rank holds stays the same set of indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from passes.layouts.axes import Axes, Size
from passes.layouts.layout import IndexSet, Layout, Shards

__all__ = ["flattened", "on_dims", "on_virtual", "relayout", "unflattened"]


def on_dims(layout: Layout, axes: Axes) -> Layout:
    """A weight's layout on its virtual dims, stated on its dims (a dim of size one is no virtual dim)."""
    dims = [d for d, sizes in enumerate(axes) for _ in sizes]
    return Layout.of({dims[v]: s for v, s in layout.shards})


def on_virtual(layout: Layout, axes: Axes) -> Layout:
    """A weight's layout on its dims, stated on its virtual dims."""
    virtual = {d: v for v, d in enumerate(d for d, sizes in enumerate(axes) for _ in sizes)}
    return Layout.of({virtual[d]: s for d, s in layout.shards})


def flattened(sizes: Sequence[Size], shards: Sequence[Shards | None], tp: int) -> Shards | None:
    """The index sets on the product of static factors, from those on each factor (None: it is not split)."""
    if all(s is None for s in shards):
        return None
    sets = []
    for rank in range(tp):
        flat = np.zeros(1, dtype=np.int64)
        for size, s in zip(sizes, shards, strict=True):
            inner = np.arange(size.number) if s is None else s.ranks[rank].indices
            flat = (flat[:, None] * size.number + inner[None, :]).reshape(-1)
        sets.append(IndexSet.of(flat))
    return Shards(int(np.prod([s.number for s in sizes])), tuple(sets))


def unflattened(shards: Shards, sizes: Sequence[Size], tp: int) -> list[Shards | None] | None:
    """The index sets on each factor, from those on the product; None if these are no product of sets."""
    shape = [s.number for s in sizes]
    by_factor: list[list[IndexSet]] = [[] for _ in sizes]
    for rank in range(tp):
        mask = np.zeros(shards.size, dtype=bool)
        mask[shards.ranks[rank].indices] = True
        mask = mask.reshape(shape)
        sets = [np.flatnonzero(mask.any(axis=tuple(j for j in range(len(shape)) if j != i))) for i in range(len(shape))]
        if int(np.prod([len(s) for s in sets])) != mask.sum():
            return None
        for i, s in enumerate(sets):
            by_factor[i].append(IndexSet.of(s))
    return [
        None if all(len(s) == size.number for s in ranks) else Shards(size.number, tuple(ranks))
        for ranks, size in zip(by_factor, sizes, strict=True)
    ]


@lru_cache(maxsize=4096)  # repeated layers ask the same
def relayout(layout: Layout, axes: Axes, other: Axes, tp: int) -> Layout | None:
    """The same layout stated on other factors of the same dims; None if they cannot express it."""
    if axes == other or layout.whole:
        return layout
    dims = layout.dims
    out: dict[int, Shards | None] = {}
    a = b = 0
    for mine, theirs in zip(axes, other, strict=True):
        if len(mine) == len(theirs) == 1:  # the same size, perhaps written differently
            out[b] = dims.get(a)
            a, b = a + 1, b + 1
            continue
        left, right = list(mine), list(theirs)
        while left or right:
            group_a, group_b = [left.pop(0)], [right.pop(0)]
            x, y = group_a[0], group_b[0]
            while x != y:
                if y.over(x) is not None and left:
                    group_a.append(left.pop(0))
                    x = x * group_a[-1]
                elif x.over(y) is not None and right:
                    group_b.append(right.pop(0))
                    y = y * group_b[-1]
                else:
                    return None
            own = [dims.get(a + i) for i in range(len(group_a))]
            if any(s is not None for s in own):
                if len(group_a) == 1 and len(group_b) == 1:
                    out[b] = own[0]
                elif not all(s.static for s in group_a + group_b):
                    return None
                else:
                    flat = flattened(group_a, own, tp)
                    assert flat is not None
                    split = unflattened(flat, group_b, tp)
                    if split is None:
                        return None
                    out.update({b + i: s for i, s in enumerate(split) if s is not None})
            a += len(group_a)
            b += len(group_b)
    return Layout.of({d: s for d, s in out.items() if s is not None})
