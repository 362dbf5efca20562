"""choose: the classes to split: the heaviest set of which no two split the same value."""

from __future__ import annotations

from collections.abc import Hashable

import networkx as nx

__all__ = ["choose"]


def choose(conflicts: nx.Graph) -> set[Hashable]:
    """A maximum-weight independent set.

    Nodes carry ``weight``. Exact: branch on the node with the most conflicts, solve the components
    that remain apart. In a transformer the conflicts form a star (the residual stream's class against
    each layer's heads and MLP), which one branching takes apart.
    """
    graph = conflicts.subgraph([n for n, d in conflicts.nodes(data=True) if d["weight"] > 0])
    chosen: set[Hashable] = set()
    for component in nx.connected_components(graph):
        chosen |= _best(graph.subgraph(component).copy())[1]
    return chosen


def _best(graph: nx.Graph) -> tuple[float, set[Hashable]]:
    if graph.number_of_nodes() == 0:
        return 0.0, set()
    if not nx.is_connected(graph):
        parts = [_best(graph.subgraph(c).copy()) for c in nx.connected_components(graph)]
        return sum(w for w, _ in parts), set().union(*(s for _, s in parts))
    node = max(graph, key=lambda n: (graph.degree(n), graph.nodes[n]["weight"]))
    weight = graph.nodes[node]["weight"]
    around = set(graph[node])
    without = graph.subgraph(set(graph) - {node}).copy()
    if weight >= sum(graph.nodes[n]["weight"] for n in around):
        rest = _best(without.subgraph(set(without) - around))
        return rest[0] + weight, rest[1] | {node}
    skipped = _best(without)
    taken = _best(without.subgraph(set(without) - around))
    if taken[0] + weight > skipped[0]:
        return taken[0] + weight, taken[1] | {node}
    return skipped
