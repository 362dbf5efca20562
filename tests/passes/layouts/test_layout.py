"""Index sets, shards and layouts against plain numpy masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes import IndexSet, Layout, Shards
from passes.layouts.relayout import flattened, relayout, unflattened
from tests.passes.layouts.strategies import index_sets, mask, shards, sized, sizes

TP = 3


@given(st.lists(st.integers(0, 30)))
def test_index_set_keeps_sorted_maximal_runs(indices: list[int]) -> None:
    found = IndexSet.of(indices)
    assert found.indices.tolist() == sorted(set(indices))
    assert len(found) == len(set(indices))
    assert all(a < b for a, b in found.runs)
    assert all(before[1] < after[0] for before, after in zip(found.runs, found.runs[1:], strict=False))
    assert IndexSet.of(found.indices) == found


def test_index_set_text() -> None:
    assert str(IndexSet.of([0, 1, 2, 7])) == "0:3,7:8"
    assert str(IndexSet.of([])) == "-"
    assert IndexSet.full(0) == IndexSet.of([])
    assert IndexSet.full(4).runs == ((0, 4),)


@given(st.data())
def test_positions_of_a_subset(data: st.DataObject) -> None:
    whole = data.draw(index_sets(20))
    subset = IndexSet.of([i for i in whole.indices if data.draw(st.booleans())])
    assert whole.indices[whole.positions(subset).indices].tolist() == subset.indices.tolist()


def test_positions_of_what_is_not_a_subset() -> None:
    for stranger in ([5], [0], [9]):
        with pytest.raises(ValueError, match="not a subset"):
            IndexSet.of([1, 2, 7]).positions(IndexSet.of(stranger))


@given(shards(8, TP))
def test_shards(held: Shards) -> None:
    masks = np.stack([mask(held, r) for r in range(TP)])
    assert held.counts == tuple(masks.sum(1))
    assert held.covers == masks.any(0).all()
    owned = np.stack([mask(held.owned, r) for r in range(TP)])
    assert (owned.sum(0) == masks.any(0)).all(), "each index is left to one of its holders"
    assert (owned <= masks).all()
    assert (masks.argmax(0) == owned.argmax(0)).all(), "to the lowest of them"
    assert held.contains(held.owned)
    if held.covers:
        assert held.disjoint == (masks.sum(0) == 1).all()
        assert held.contains(Shards(8, held.ranks[::-1])) == all((masks[r] >= masks[-1 - r]).all() for r in range(TP))


@given(shards(6, TP))
def test_replicas_are_groups_of_equal_sets(held: Shards) -> None:
    groups = held.replicas
    different = list(dict.fromkeys(held.ranks))
    partition = sum(len(s) for s in different) == 6 == len({i for s in different for i in s.indices})
    if groups is None:
        assert not partition
    elif held.covers:
        assert partition
        assert sorted(r for g in groups for r in g) == list(range(TP))
        assert all(held.ranks[r] == held.ranks[g[0]] for g in groups for r in g)


@given(st.data(), sizes)
def test_local_shape_is_that_of_the_index_product(data: st.DataObject, numbers: list[int]) -> None:
    layout = Layout.of({d: data.draw(shards(n, TP)) for d, n in enumerate(numbers) if data.draw(st.booleans())})
    whole = np.zeros(numbers)
    for rank in range(TP):
        held = [layout.dims[d].ranks[rank].indices if d in layout.dims else np.arange(n) for d, n in enumerate(numbers)]
        assert layout.local_shape(numbers, rank) == whole[np.ix_(*held)].shape
    assert layout.whole == (not layout.dims)


@given(st.data(), sizes)
def test_flattened_is_a_reshape_of_the_mask(data: st.DataObject, numbers: list[int]) -> None:
    parts = [data.draw(st.none() | shards(n, TP)) for n in numbers]
    flat = flattened(sized(numbers), parts, TP)
    if all(p is None for p in parts):
        assert flat is None
        return
    assert flat is not None
    for rank in range(TP):
        each = [np.ones(n, bool) if p is None else mask(p, rank) for p, n in zip(parts, numbers, strict=True)]
        product = np.ones((), bool)
        for m in each:
            product = np.multiply.outer(product, m)
        assert (mask(flat, rank) == product.reshape(-1)).all()


@given(st.data(), sizes)
def test_unflattened_undoes_flattened(data: st.DataObject, numbers: list[int]) -> None:
    parts = [data.draw(shards(n, TP)) for n in numbers]
    flat = flattened(sized(numbers), parts, TP)
    assert flat is not None
    back = unflattened(flat, sized(numbers), TP)
    assert back is not None
    assert flattened(sized(numbers), back, TP) == flat or all(b is None for b in back)
    whole = [Shards(n, (IndexSet.full(n),) * TP) for n in numbers]
    assert [b or w for b, w in zip(back, whole, strict=True)] == parts


@given(shards(12, TP))
def test_unflattened_says_what_is_no_product(held: Shards) -> None:
    found = unflattened(held, sized([3, 4]), TP)
    for rank in range(TP):
        m = mask(held, rank).reshape(3, 4)
        product = np.multiply.outer(m.any(1), m.any(0))
        if found is None and not (product == m).all():
            return
        if found is not None:
            assert (product == m).all()
    assert found is not None


@given(st.data())
def test_relayout_there_and_back(data: st.DataObject) -> None:
    four, three, five = sized([4, 3, 5])
    fine, coarse = ((four, three), (five,)), ((four * three,), (five,))
    layout = Layout.of({v: data.draw(shards(n, TP)) for v, n in enumerate([4, 3, 5]) if data.draw(st.booleans())})
    there = relayout(layout, fine, coarse, TP)
    assert there is not None
    if 2 in layout.dims:
        assert there.dims[1] == layout.dims[2], "dims that both spell alike are left as they are"
    back = relayout(there, coarse, fine, TP)
    assert back is not None
    full = {v: Shards(n, (IndexSet.full(n),) * TP) for v, n in enumerate([4, 3, 5])}
    assert full | back.dims == full | layout.dims


def test_relayout_of_what_cannot_be_said() -> None:
    held = Shards(12, (IndexSet.of([0, 5]), IndexSet.of([i for i in range(12) if i not in (0, 5)])))
    twelve, four, three = sized([12, 4, 3])
    assert relayout(Layout.of({0: held}), ((twelve,),), ((four, three),), 2) is None
