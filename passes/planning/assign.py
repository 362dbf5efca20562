"""assign: from the layouts of the weights to the layouts of all values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from torch import fx

from passes.layouts.facts import Facts
from passes.layouts.layout import WHOLE, IndexSet, Layout, Shards
from passes.layouts.relayout import on_virtual
from passes.layouts.units import Factor, services_of
from passes.planning.persistent_state import settled_layout

__all__ = ["assign", "factor_shards", "spread_to_sources"]


def spread_to_sources(ranks: np.ndarray, users: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Per unit the ranks that hold it, once each source is on all the ranks of its users.

    Args:
        ranks: per unit, a bit for each rank that holds it, before sources are spread.
        users: with ``sources``, the pairs of units in which the source serves the user; users ascending.
        sources: see ``users``.
    """
    ranks = ranks.copy()
    changed = np.unique(users)
    while changed.size:
        _, service = services_of(users, changed)
        service = service[ranks[users[service]] & ~ranks[sources[service]] != 0]
        np.bitwise_or.at(ranks, sources[service], ranks[users[service]])
        changed = np.unique(sources[service])
    return ranks


def factor_shards(factor: Factor, ranks: np.ndarray, tp: int) -> dict[int, Shards] | None:
    """A factor's shards by virtual dim.

    Args:
        factor: the factor.
        ranks: per label, a bit for each rank that holds it.
        tp: the number of ranks.

    Returns:
        The shards of the split dims; None where the indices of some rank are no product of per-dim sets, or empty.
    """
    bits = ranks[factor.labels]
    if (bits == (1 << tp) - 1).all():
        return {}
    shards = _shards_of(bits.tobytes(), bits.shape, tp)  # values that move together have the same bits
    return None if shards is None else {v: s for v, s in zip(factor.dims, shards, strict=True) if s is not None}


@lru_cache(maxsize=1024)
def _shards_of(bits: bytes, shape: tuple[int, ...], tp: int) -> tuple[Shards | None, ...] | None:
    """The shards of each dim of an array of rank bits; None for a dim that all ranks hold entirely."""
    ranks = np.frombuffer(bits, dtype=np.int64).reshape(shape)
    sets: list[list[IndexSet]] = [[] for _ in shape]
    dims = range(ranks.ndim)
    for rank in range(tp):
        mask = (ranks >> rank) & 1 == 1
        indices = [np.flatnonzero(mask.any(axis=tuple(j for j in dims if j != i))) for i in dims]
        if not all(i.size for i in indices) or int(np.prod([i.size for i in indices])) != int(mask.sum()):
            return None
        for dim, array in enumerate(indices):
            sets[dim].append(IndexSet.of(array))
    return tuple(
        Shards(size, tuple(per_rank)) if any(len(s) != size for s in per_rank) else None
        for size, per_rank in zip(shape, sets, strict=True)
    )


def assign(
    graph: fx.Graph,
    facts: Facts,
    weight_layouts: Mapping[str, Layout],
    tp: int,
    slots: Mapping[str, Layout] | None = None,
) -> dict[fx.Node, Layout]:
    """Each value's layout, as it follows from the layouts of the weights.

    A unit is on the ranks where a split weight or input puts it; else on the ranks of the units that it serves; else
    on all ranks. A value is replicated where two weights disagree about a unit, where its indices on some rank are no
    product of per-dim sets, and where two unrelated dims of it would be split. Conversions then bridge the
    difference, so that the result is right, if not fast.

    Args:
        graph: the captured graph.
        facts: the facts from :func:`passes.propagate` about it.
        weight_layouts: each split weight's layout, by ``get_attr`` target.
        tp: the number of ranks.
        slots: the layouts of inputs that stay split between calls, by slot.

    Returns:
        The layouts of the split values, on their virtual dims; all others are replicated.
    """
    roots = facts.units.roots()
    everywhere = (1 << tp) - 1
    ranks = np.zeros(facts.units.count, dtype=np.int64)
    fixed = np.zeros(facts.units.count, dtype=bool)
    clash = np.zeros(facts.units.count, dtype=bool)
    for node in graph.nodes:
        if node.op not in ("get_attr", "placeholder") or node not in facts.values:
            continue
        layout = weight_layouts.get(node.target) if node.op == "get_attr" else settled_layout(node, slots or {})
        shards = on_virtual(layout or WHOLE, facts.values[node].axes).dims
        for factor in facts.values[node].factors:
            (v,) = factor.dims
            if v not in shards:
                continue
            bits = np.zeros(shards[v].size, dtype=np.int64)
            for rank, indices in enumerate(shards[v].ranks):
                bits[indices.indices] |= 1 << rank
            units = roots[factor.labels]
            clash[units[fixed[units] & (ranks[units] != bits)]] = True
            ranks[units], fixed[units] = bits, True
    ranks[clash] = everywhere
    users, sources = facts.units.services(roots)
    has_user = np.zeros(facts.units.count, dtype=bool)
    has_user[sources] = True
    ranks[~fixed & ~has_user] = everywhere
    ranks = spread_to_sources(ranks, users, sources)
    ranks[ranks == 0] = everywhere
    label_ranks = ranks[roots]
    layouts: dict[fx.Node, Layout] = {}
    if tp == 1:
        return layouts
    for node, value in facts.values.items():
        split = [s for f in value.factors if (s := factor_shards(f, label_ranks, tp))]
        if len(split) == 1 and all(s.covers for s in split[0].values()):
            layouts[node] = Layout.of(split[0])
    return layouts
