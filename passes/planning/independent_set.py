"""independent_set: choose the classes to split, as a maximum-weight independent set of the graph of conflicts."""

from __future__ import annotations

from collections.abc import Hashable

import networkx as nx

__all__ = ["choose"]


def choose(conflicts: nx.Graph) -> set[Hashable]:
    """The heaviest set of nodes without a conflict between two of them.

    Nodes carry ``weight``. The search is exact: it branches on the node with the most conflicts, and solves each
    remaining component by itself. In a transformer the conflicts form a star (the residual stream's class against
    each layer's heads and MLP), which falls apart at the first branching.
    """
    graph = conflicts.subgraph([n for n, d in conflicts.nodes(data=True) if d["weight"] > 0])
    chosen: set[Hashable] = set()
    for component in nx.connected_components(graph):
        chosen |= _best(graph.subgraph(component).copy())[1]
    return chosen


def _best(graph: nx.Graph) -> tuple[float, set[Hashable]]:
    """The weight of the heaviest independent set, and the set."""
    if graph.number_of_nodes() == 0:
        return 0.0, set()
    if not nx.is_connected(graph):
        best = [_best(graph.subgraph(c).copy()) for c in nx.connected_components(graph)]
        return sum(w for w, _ in best), set().union(*(s for _, s in best))
    node = max(graph, key=lambda n: (graph.degree(n), graph.nodes[n]["weight"]))
    weight = graph.nodes[node]["weight"]
    neighbours = set(graph[node])
    without = graph.subgraph(set(graph) - {node}).copy()
    if weight >= sum(graph.nodes[n]["weight"] for n in neighbours):
        rest = _best(without.subgraph(set(without) - neighbours))
        return rest[0] + weight, rest[1] | {node}
    skipped = _best(without)
    taken = _best(without.subgraph(set(without) - neighbours))
    if taken[0] + weight > skipped[0]:
        return taken[0] + weight, taken[1] | {node}
    return skipped
