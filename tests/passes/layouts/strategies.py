"""Hypothesis strategies for the layout algebra."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from passes import IndexSet, Shards
from passes.layouts.axes import Size

sizes = st.lists(st.sampled_from([2, 3, 4, 5, 6]), min_size=1, max_size=3)
"""The sizes of a few static factors."""


@st.composite
def index_sets(draw: st.DrawFn, size: int, minimum: int = 0) -> IndexSet:
    """Any subset of ``range(size)``."""
    return IndexSet.of(draw(st.sets(st.integers(0, size - 1), min_size=minimum)) if size else [])


@st.composite
def shards(draw: st.DrawFn, size: int, tp: int) -> Shards:
    """One dim over ``tp`` ranks in any way, overlapping and leaving out included."""
    return Shards(size, tuple(draw(index_sets(size, minimum=1)) for _ in range(tp)))


def mask(held: Shards, rank: int) -> np.ndarray:
    """What a rank holds, as a boolean array."""
    found = np.zeros(held.size, dtype=bool)
    found[held.ranks[rank].indices] = True
    return found


def sized(numbers: list[int]) -> tuple[Size, ...]:
    """Static factors."""
    return tuple(Size(n) for n in numbers)
