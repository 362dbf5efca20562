"""The best independent set, against brute force."""

from __future__ import annotations

import itertools

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from passes.planning.independent_set import choose


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
