"""shard: rewrite a captured graph so that each rank computes its part.

One walk over the graph. Each op's rule (:mod:`passes.rules`) asks the :class:`Builder` for its inputs
in the layouts it needs and emits what stands for the op; a conversion is inserted where an input is not in
the wanted layout (:mod:`passes.rules.conversion`).

A pending sum is resolved as late as it pays: sums of sums stay pending, and what is whole and only
added (a bias, a residual) waits beside it and is added once, after the reduction.

The result is one graph for all ranks in which a constant that differs between ranks is a
:class:`PerRank`; :func:`passes.localize` picks one rank's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from passes.layouts.facts import Facts
from passes.layouts.layout import Layout
from passes.rules.builder import Builder

__all__ = ["shard"]

aten = torch.ops.aten


def shard(
    graph: fx.Graph,
    facts: Facts,
    layouts: dict[fx.Node, Layout],
    weight_layouts: dict[str, Layout],
    tp: int,
    slots: Mapping[str, Layout] | None = None,
) -> Builder:
    """Rewrite a captured graph for ``tp`` ranks.

    Args:
        graph: the captured, simplified graph.
        facts: what :func:`passes.propagate` found out about it.
        layouts: each value's planned layout (:func:`passes.assign`), on its own virtual dims.
        weight_layouts: the layout in which each ``get_attr`` target is held by the ranks.
        tp: the number of ranks.
        slots: the layouts of inputs and results that ranks keep in parts, as far as they are decided
            (:mod:`passes.planning.persistent_state`).

    Returns:
        The Sharder, whose ``graph`` is the rewritten graph and whose ``gathered`` lists the split
        values that had to be made whole, each with the op that wanted it; ``slots`` has the layouts of all slots,
        and ``inputs`` and ``results`` those of the split ones, by position.
    """
    sharder = Builder(graph, facts, layouts, weight_layouts, tp, slots)
    sharder.run()
    return sharder
