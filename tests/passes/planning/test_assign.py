"""The layouts of factors, against naive versions of the same."""

from __future__ import annotations

import networkx as nx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from passes.layouts.units import Factor
from passes.planning.assign import factor_shards, spread_to_sources
from tests.passes.layouts.test_units import COUNT, TP, pairs


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
