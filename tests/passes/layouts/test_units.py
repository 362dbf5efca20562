"""Units against naive versions of the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from passes.layouts.axes import Size
from passes.layouts.units import Factor, Units, components

COUNT, TP = 12, 3
pairs = st.lists(st.tuples(st.integers(0, COUNT - 1), st.integers(0, COUNT - 1)), max_size=15)


def naive_roots(count: int, edges: list[tuple[int, int]]) -> list[int]:
    """The lowest member of each one's set, by repeated relabelling."""
    label = list(range(count))
    for a, b in edges:
        low, high = sorted((label[a], label[b]))
        label = [low if x == high else x for x in label]
    return label


@given(pairs)
def test_components_against_relabelling(edges: list[tuple[int, int]]) -> None:
    a, b = (np.array([e[i] for e in edges], dtype=np.int64) for i in (0, 1))
    assert components(COUNT, a, b).tolist() == naive_roots(COUNT, edges)


@given(pairs, st.lists(st.sets(st.integers(0, COUNT - 1)), max_size=3))
def test_units_against_relabelling(edges: list[tuple[int, int]], groups: list[set[int]]) -> None:
    units = Units()
    labels = units.fresh([COUNT])
    for a, b in edges:
        units.unite(labels[a : a + 1], labels[b : b + 1])
    for group in groups:
        units.unite_all(labels[sorted(group)])
    expected = edges + [(min(g), x) for g in groups for x in g]
    assert units.roots().tolist() == naive_roots(COUNT, expected)


def test_unite_along_leaves_one_label_for_each_other_index() -> None:
    units = Units()
    factor = Factor((0, 2), units.fresh([3, 4]))
    rest = units.unite_along(factor, [2])
    assert rest is not None
    assert rest.dims == (0,)
    roots = units.roots()
    assert (roots[factor.labels] == roots[rest.labels][:, None]).all()
    assert len(set(roots)) == 3
    assert units.unite_along(rest, [0]) is None
    assert len(set(units.roots())) == 1


def test_services_are_between_units() -> None:
    units = Units()
    keys, queries = units.fresh([2]), units.fresh([2, 3])
    units.serve(queries, keys[:, None])
    units.unite(queries[0, 0], queries[0, 1])
    users, sources = units.services(units.roots())
    assert sorted(zip(users.tolist(), sources.tolist())) == [(2, 0), (4, 0), (5, 1), (6, 1), (7, 1)]


def test_symbolic_dims_carry_no_labels() -> None:
    units = Units()
    value = units.labelled((Size(1, ("s",)), Size(4), Size(1)))
    assert [f.dims for f in value.factors] == [(1,)]
    assert value.axes[2] == ()
