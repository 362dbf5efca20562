"""decide: which classes to split, and which of their units each rank gets."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import networkx as nx
import numpy as np
from torch import fx

from passes.graphs import shape, where
from passes.layouts.facts import Facts
from passes.layouts.layout import Layout
from passes.layouts.relayout import on_dims
from passes.layouts.units import Factor
from passes.planning.assign import factor_shards, spread_to_sources
from passes.planning.classes import Classes, class_gains, deal
from passes.planning.cost import CostModel
from passes.planning.independent_set import choose
from passes.planning.reasons import Choice, Reason, reasons_for

__all__ = ["Decision", "decide"]


@dataclass
class Decision:
    """The plan's core: the split weights' layouts, and why each other weight stays unsplit.

    Attributes:
        weight_layouts: each split weight's layout on its dims, by ``get_attr`` target.
        reasons: the reasons for the unsplit weights, by ``get_attr`` target.
    """

    weight_layouts: dict[str, Layout] = field(default_factory=dict)
    reasons: dict[str, Reason] = field(default_factory=dict)


def decide(graph: fx.Graph, facts: Facts, tp: int, cost: CostModel | None = None) -> Decision:
    """Choose the weights' layouts for ``tp`` ranks.

    Args:
        graph: the captured graph.
        facts: the facts from :func:`passes.propagate` about it. Units that cannot be split apart are united here.
        tp: the number of ranks.
        cost: the hardware model; left out, it is made for the graph.
    """
    weights = [n for n in graph.nodes if n.op == "get_attr" and n.meta.get("grad") and n in facts.values]
    if tp == 1:
        return Decision(reasons={str(n.target): Reason("tp = 1") for n in weights})
    decision, banned = Decision(), dict[int, str]()
    cost = cost or CostModel.of(graph)
    while True:
        classes = Classes(facts)
        gains = class_gains(graph, facts, classes, tp, cost)
        weighty = {c for n in weights for f in facts.values[n].factors for c in classes.deciding(f.labels)}
        candidates = {
            c: gains.get(c, 0.0)
            for c, families in classes.families.items()
            if c in weighty and gains.get(c, 0.0) > 0 and any(f.size >= tp for f in families) and c not in banned
        }
        chosen = choose(_conflicts(facts, classes, candidates, tp))
        ranks = _rank_bits(classes, chosen, tp)
        obstacle = _obstacle(weights, facts, ranks, tp)
        if obstacle is None:
            if not (idle := {c for c in candidates if c in chosen} - _splitting(weights, facts, classes, ranks, tp)):
                _write_down(decision, weights, ranks, Choice(facts, classes, gains, chosen, banned, tp))
                return decision
            banned |= dict.fromkeys(idle, "splits no weight")  # it divides computation only: slots of a router
            continue
        node, factors = obstacle
        if len(factors) == 1:  # the indices of some rank are no product: only the outermost dim is split
            facts.mix(node, factors[0], factors[0].dims[1:])
        else:  # two dims of one value split by the same classes
            splitting = {c for f in factors for c in classes.deciding(f.labels) if c in chosen}
            worst = min(splitting, key=lambda c: gains.get(c, 0.0))
            if gains[worst] > cost.per_parameter * cost.elements(shape(node)) * (1 - 1 / tp):  # small: it stays unsplit
                weights.remove(node)
                decision.reasons[str(node.target)] = Reason("two dims of it would be split by the same units")
            else:
                banned[worst] = f"two dims of one value would be split at {where(node)}"


def _conflicts(facts: Facts, classes: Classes, candidates: dict[int, float], tp: int) -> nx.Graph:
    """The graph of candidate classes, weighted by gain, with an edge between two that split dims of one value."""
    conflicts = nx.Graph()
    conflicts.add_nodes_from((c, {"weight": gain}) for c, gain in candidates.items())
    for value in facts.values.values():
        by_factor = [
            classes.deciding(f.labels) & set(candidates) for f in value.factors if classes.splits(f.labels, tp)
        ]
        if len(by_factor) > 1:
            for i, first in enumerate(by_factor):
                for second in by_factor[i + 1 :]:
                    conflicts.add_edges_from((a, b) for a in first for b in second if a != b)
    return conflicts


def _rank_bits(classes: Classes, chosen: Iterable[object], tp: int) -> np.ndarray:
    """Per label, a bit for each rank that holds it."""
    everywhere = (1 << tp) - 1
    ranks = np.where(classes.is_source, 0, everywhere).astype(np.int64)
    for c in chosen:
        for family in classes.families[c]:  # type: ignore[index]
            if family.size >= tp:
                ranks[family] = 1 << _owners(family, classes.groups(family), tp)
    ranks = spread_to_sources(ranks, classes.users, classes.sources)
    ranks[ranks == 0] = everywhere
    return ranks[classes.roots]


def _owners(units: np.ndarray, groups: np.ndarray, tp: int) -> np.ndarray:
    """The rank of each unit: contiguous, even, and on group boundaries where there are groups.

    With at least as many groups as ranks each rank gets entire groups; with fewer, each group gets some
    ranks, which divide its units. Groups keep the query heads of one key-value head together.
    """
    _, first, group, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    sizes = counts[np.argsort(first)].tolist()
    if len(sizes) == len(units) or len(sizes) == 1:
        per_rank = deal(len(units), tp)
    elif len(sizes) >= tp:
        bounds = np.cumsum([0, *deal(len(sizes), tp)])
        per_rank = [sum(sizes[a:b]) for a, b in pairwise(bounds)]
    else:
        ranks_per_group = deal(tp, len(sizes))
        if any(size < ranks for size, ranks in zip(sizes, ranks_per_group, strict=True)):
            per_rank = deal(len(units), tp)
        else:
            per_rank = [n for size, ranks in zip(sizes, ranks_per_group, strict=True) for n in deal(size, ranks)]
    owners = np.empty(len(units), dtype=np.int64)
    owners[np.argsort(first[group], kind="stable")] = np.repeat(np.arange(tp), per_rank)
    return owners


def _splitting(weights: list[fx.Node], facts: Facts, classes: Classes, ranks: np.ndarray, tp: int) -> set[int]:
    """The classes that take part in the splitting of some weight."""
    factors = [f for node in weights for f in facts.values[node].factors]
    return {c for f in factors if factor_shards(f, ranks, tp) for c in classes.deciding(f.labels)}


def _obstacle(
    weights: Collection[fx.Node], facts: Facts, ranks: np.ndarray, tp: int
) -> tuple[fx.Node, list[Factor]] | None:
    """The first value that cannot be laid out so, with the factor or the factors at fault; None if there is none."""
    weights = set(weights)
    for node, value in facts.values.items():
        split = []
        for factor in value.factors:
            shards = factor_shards(factor, ranks, tp)
            if shards is None and len(factor.dims) > 1 and _is_ragged(factor, ranks, tp):
                return node, [factor]
            if shards:
                split.append(factor)
        if len(split) > 1 and node in weights:
            return node, split
    return None


def _is_ragged(factor: Factor, ranks: np.ndarray, tp: int) -> bool:
    """Whether some rank's indices are not a product of per-dim sets (a rank without any index does not count)."""
    bits = ranks[factor.labels]
    for rank in range(tp):
        mask = (bits >> rank) & 1 == 1
        extents = [int(mask.any(axis=tuple(j for j in range(mask.ndim) if j != i)).sum()) for i in range(mask.ndim)]
        if int(np.prod(extents)) != int(mask.sum()):
            return True
    return False


def _write_down(decision: Decision, weights: list[fx.Node], ranks: np.ndarray, choice: Choice) -> None:
    """Add to the decision each split weight's layout, and the reasons for the unsplit ones."""
    unsplit = []
    for node in weights:
        value, shards = choice.facts.values[node], {}
        for factor in value.factors:
            shards.update(factor_shards(factor, ranks, choice.tp) or {})
        if shards and all(s.covers for s in shards.values()):
            decision.weight_layouts[str(node.target)] = on_dims(Layout.of(shards), value.axes)
        else:
            unsplit.append(node)
    decision.reasons |= reasons_for(unsplit, choice)
