"""Units, and the plan that is made of them, against naive versions of the same."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from passes.layouts.axes import Size
from passes.layouts.units import Factor, Units, components
from passes.planning.assign import factor_shards, spread_to_sources
from passes.planning.classes import deal
from passes.planning.decide import _owners
from passes.planning.independent_set import choose

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


@given(st.lists(st.integers(0, 7), min_size=COUNT, max_size=COUNT), pairs)
def test_spread_to_sources_is_a_closure(bits: list[int], serves: list[tuple[int, int]]) -> None:
    ranks = np.array(bits)
    users, sources = (np.array([e[i] for e in sorted(serves)], dtype=np.int64) for i in (0, 1))
    graph = nx.DiGraph(serves)
    graph.add_nodes_from(range(COUNT))
    expected = [int(np.bitwise_or.reduce([bits[n], *(bits[u] for u in nx.ancestors(graph, n))])) for n in range(COUNT)]
    assert spread_to_sources(ranks, users, sources).tolist() == expected
    assert ranks.tolist() == bits, "the argument is left as it was"


@given(st.lists(st.integers(0, 2**TP - 1), min_size=6, max_size=6))
def test_factor_shards_say_what_each_rank_holds(bits: list[int]) -> None:
    factor = Factor((1, 4), np.arange(6).reshape(2, 3))
    found = factor_shards(factor, np.array(bits), TP)
    masks = [np.array([(b >> r) & 1 == 1 for b in bits]).reshape(2, 3) for r in range(TP)]
    products = [np.multiply.outer(m.any(1), m.any(0)) for m in masks]
    possible = all((p == m).all() and m.any() for p, m in zip(products, masks))
    assert (found is not None) == possible
    for rank in range(TP if found is not None else 0):
        held = [found[v].ranks[rank].indices if v in found else np.arange(n) for v, n in ((1, 2), (4, 3))]
        expected = np.zeros((2, 3), bool)
        expected[np.ix_(*held)] = True
        assert (expected == masks[rank]).all()


@given(st.integers(0, 50), st.integers(1, 9))
def test_deal_is_even(count: int, ranks: int) -> None:
    dealt = deal(count, ranks)
    assert sum(dealt) == count
    assert len(dealt) == ranks
    assert dealt == sorted(dealt, reverse=True)
    assert max(dealt) - min(dealt) <= 1


@given(st.integers(1, 6), st.integers(1, 6), st.integers(2, 8), st.booleans())
def test_owners_respect_groups(groups: int, each: int, tp: int, tiled: bool) -> None:
    count = groups * each
    if count < tp:
        return
    group = [i % groups if tiled else i // each for i in range(count)]
    owners = _owners(np.arange(count), group, tp)
    assert sorted(set(owners.tolist())) == list(range(tp)), "every rank gets something"
    together = [{int(o) for o, g in zip(owners, group) if g == wanted} for wanted in range(groups)]
    if groups >= tp and each > 1 and groups > 1:
        assert all(len(t) == 1 for t in together), "whole groups"
    elif 1 < groups < tp:
        assert sum(len(t) for t in together) == tp, "a rank serves one group"
    else:
        assert max(np.bincount(owners)) - min(np.bincount(owners)) <= 1


@given(
    st.lists(st.integers(-3, 20), min_size=1, max_size=8),
    st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=14),
)
def test_choose_against_brute_force(weights: list[int], edges: set[tuple[int, int]]) -> None:
    graph = nx.Graph()
    graph.add_nodes_from((i, {"weight": w}) for i, w in enumerate(weights))
    graph.add_edges_from((a, b) for a, b in edges if a != b and max(a, b) < len(weights))
    best = max(
        sum(weights[n] for n in subset)
        for size in range(len(weights) + 1)
        for subset in itertools.combinations(range(len(weights)), size)
        if not any(graph.has_edge(a, b) for a, b in itertools.combinations(subset, 2))
    )
    chosen = choose(graph)
    assert not any(graph.has_edge(a, b) for a, b in itertools.combinations(chosen, 2))
    assert sum(weights[n] for n in chosen) == best


def test_symbolic_dims_carry_no_labels() -> None:
    units = Units()
    value = units.labelled((Size(1, ("s",)), Size(4), Size(1)))
    assert [f.dims for f in value.factors] == [(1,)]
    assert value.axes[2] == ()
