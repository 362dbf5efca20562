"""localize: one rank's graph from the graph for all ranks."""

from __future__ import annotations

from typing import Any

from torch import fx

from passes.layouts.sharded_value import PerRank

__all__ = ["localize"]


def localize(graph: fx.Graph, rank: int) -> fx.Graph:
    """A copy of a rewritten graph in which the constants of ``rank`` replace all per-rank constants."""

    def pick(argument: Any) -> Any:
        """An argument with the rank's own constants, at any depth."""
        if isinstance(argument, PerRank):
            return argument.values[rank]
        if isinstance(argument, (tuple, list)):
            return type(argument)(pick(a) for a in argument)
        if isinstance(argument, dict):
            return {k: pick(a) for k, a in argument.items()}
        return argument

    local = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = local.node_copy(node, copies.__getitem__)
        copies[node].args = pick(copies[node].args)
        copies[node].kwargs = pick(dict(copies[node].kwargs))
    return local
