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
    """Add to each source unit the ranks of its users, until nothing changes.

    Args:
        ranks: per unit, a bit for each rank that holds it.
        users: with ``sources``, the pairs of which the second serves the first; ascending.
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
    """A factor's shards by virtual dim, given each label's ranks; None where they are no product of
    per-dim index sets or some rank would hold nothing."""
    bits = ranks[factor.labels]
    if (bits == (1 << tp) - 1).all():
        return {}
    by_place = _shards_of(bits.tobytes(), bits.shape, tp)  # values that move together have the same bits
    return None if by_place is None else {v: s for v, s in zip(factor.dims, by_place, strict=True) if s is not None}


@lru_cache(maxsize=1024)
def _shards_of(bits: bytes, shape: tuple[int, ...], tp: int) -> tuple[Shards | None, ...] | None:
    held = np.frombuffer(bits, dtype=np.int64).reshape(shape)
    sets: list[list[IndexSet]] = [[] for _ in shape]
    for rank in range(tp):
        mask = (held >> rank) & 1 == 1
        each = [np.flatnonzero(mask.any(axis=tuple(j for j in range(mask.ndim) if j != i))) for i in range(mask.ndim)]
        if not all(e.size for e in each) or int(np.prod([e.size for e in each])) != int(mask.sum()):
            return None
        for i, e in enumerate(each):
            sets[i].append(IndexSet.of(e))
    return tuple(
        Shards(size, tuple(each)) if any(len(s) != size for s in each) else None
        for size, each in zip(shape, sets, strict=True)
    )


def assign(
    graph: fx.Graph,
    facts: Facts,
    weight_layouts: Mapping[str, Layout],
    tp: int,
    slots: Mapping[str, Layout] | None = None,
) -> dict[fx.Node, Layout]:
    """Give every value the layout that follows from the layouts of the weights.

    A unit lives where a weight_layouts weight puts it, or else where the units it serves live, or else
    everywhere. Where two weights disagree about a unit, or a value's indices on some rank are no
    product of per-dim sets, or two unrelated dims of one value would be split, the value stays whole;
    conversions then bridge the difference, so that the result is right if not fast.

    Args:
        graph: the captured graph.
        facts: what :func:`passes.propagate` found out about it.
        weight_layouts: each split weight's layout, by ``get_attr`` target.
        tp: the number of ranks.
        slots: the layouts of inputs that ranks keep in parts, by slot.
    """
    roots = facts.units.roots()
    everywhere = (1 << tp) - 1
    ranks = np.zeros(facts.units.count, dtype=np.int64)
    fixed = np.zeros(facts.units.count, dtype=bool)
    clash = np.zeros(facts.units.count, dtype=bool)
    for node in graph.nodes:
        if node.op not in ("get_attr", "placeholder") or node not in facts.values:
            continue
        held = weight_layouts.get(node.target) if node.op == "get_attr" else settled_layout(node, slots or {})
        layout = on_virtual(held or WHOLE, facts.values[node].axes).dims
        for factor in facts.values[node].factors:
            (v,) = factor.dims
            if v not in layout:
                continue
            bits = np.zeros(layout[v].size, dtype=np.int64)
            for rank, indices in enumerate(layout[v].ranks):
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
    of_label = ranks[roots]
    layouts: dict[fx.Node, Layout] = {}
    if tp == 1:
        return layouts
    for node, value in facts.values.items():
        split = [s for f in value.factors if (s := factor_shards(f, of_label, tp))]
        if len(split) == 1 and all(s.covers for s in split[0].values()):
            layouts[node] = Layout.of(split[0])
    return layouts
