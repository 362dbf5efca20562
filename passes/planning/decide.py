"""decide: which classes to split, and which of their units each rank gets."""

from __future__ import annotations

from collections.abc import Iterable
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
from passes.planning.reasons import Reason

__all__ = ["Decision", "decide"]


@dataclass
class Decision:
    """The plan's core: each split weight's layout, and for the others why they stay whole.

    ``weight_layouts`` maps ``get_attr`` targets to layouts on the weight's dims.
    """

    weight_layouts: dict[str, Layout] = field(default_factory=dict)
    reasons: dict[str, Reason] = field(default_factory=dict)


def _owners(units: np.ndarray, groups: np.ndarray, tp: int) -> np.ndarray:
    """The rank of each unit: contiguous, even, and on group boundaries where there are groups.

    With at least as many groups as ranks each rank gets whole groups; with fewer, each group gets some
    ranks, who share its units. Groups keep a key-value head's query heads together.
    """
    _, first, group, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    sizes = counts[np.argsort(first)].tolist()
    if len(sizes) == len(units) or len(sizes) == 1:
        per_rank = deal(len(units), tp)
    elif len(sizes) >= tp:
        bounds = np.cumsum([0, *deal(len(sizes), tp)])
        per_rank = [sum(sizes[a:b]) for a, b in pairwise(bounds)]
    else:
        shares = deal(tp, len(sizes))
        if any(n < s for n, s in zip(sizes, shares, strict=True)):
            per_rank = deal(len(units), tp)
        else:
            per_rank = [k for n, s in zip(sizes, shares, strict=True) for k in deal(n, s)]
    owners = np.empty(len(units), dtype=np.int64)
    owners[np.argsort(first[group], kind="stable")] = np.repeat(np.arange(tp), per_rank)
    return owners


def decide(graph: fx.Graph, facts: Facts, tp: int, cost: CostModel | None = None) -> Decision:
    """Choose the weights' layouts for ``tp`` ranks.

    Args:
        graph: the captured graph.
        facts: what :func:`passes.propagate` found out about it. Units that turn out not to be
            splittable apart are united here.
        tp: the number of ranks.
        cost: the hardware model.
    """
    weights = [n for n in graph.nodes if n.op == "get_attr" and n.meta.get("grad") and n in facts.values]
    if tp == 1:
        return Decision(reasons={str(n.target): Reason("tp = 1") for n in weights})
    decision, banned = Decision(), dict[int, str]()
    cost = cost or CostModel.of(graph)
    while True:
        classes = Classes(facts)
        gains = class_gains(graph, facts, classes, tp, cost)
        weighty = {c for n in weights for f in facts.values[n].factors for c in classes.behind(f.labels)}
        able = {
            c: gains.get(c, 0.0)
            for c, families in classes.families.items()
            if c in weighty and gains.get(c, 0.0) > 0 and any(f.size >= tp for f in families) and c not in banned
        }
        conflicts = nx.Graph()
        conflicts.add_nodes_from((c, {"weight": gain}) for c, gain in able.items())
        for value in facts.values.values():
            behind = [classes.behind(f.labels) & set(able) for f in value.factors if classes.splits(f.labels, tp)]
            if len(behind) > 1:
                for i, first in enumerate(behind):
                    for second in behind[i + 1 :]:
                        conflicts.add_edges_from((a, b) for a in first for b in second if a != b)
        chosen = choose(conflicts)
        ranks = _ranks(classes, chosen, tp)
        trouble = _trouble(weights, facts, classes, ranks, chosen, tp)
        if trouble is None:
            if not (idle := {c for c in able if c in chosen} - _splitting(weights, facts, classes, ranks, tp)):
                _decide(decision, weights, facts, classes, ranks, gains, chosen, banned, tp)
                return decision
            banned |= dict.fromkeys(idle, "splits no weight")  # what divides computation only: slots of a router
            continue
        node, factors = trouble
        if len(factors) == 1:  # indices of some rank are no product: keep all but the outermost dim together
            facts.mix(node, factors[0], factors[0].dims[1:])
        else:  # two dims of one value split by the same classes
            splitting = {c for f in factors for c in classes.behind(f.labels) if c in chosen}
            worst = min(splitting, key=lambda c: gains.get(c, 0.0))
            if gains[worst] > cost.per_parameter * cost.elements(shape(node)) * (1 - 1 / tp):  # a small one stays whole
                weights.remove(node)
                decision.reasons[str(node.target)] = Reason("two dims of it would be split by the same units")
            else:
                banned[worst] = f"two dims of one value would be split at {where(node)}"


def _splitting(weights: list[fx.Node], facts: Facts, classes: Classes, ranks: np.ndarray, tp: int) -> set[int]:
    """The classes that have part in the splitting of some weight."""
    factors = [f for node in weights for f in facts.values[node].factors]
    return {c for f in factors if factor_shards(f, ranks, tp) for c in classes.behind(f.labels)}


def _ranks(classes: Classes, chosen: Iterable[object], tp: int) -> np.ndarray:
    """Per label, a bit for each rank that holds it."""
    everywhere = (1 << tp) - 1
    ranks = np.where(classes.served, 0, everywhere).astype(np.int64)
    for c in chosen:
        for family in classes.families[c]:  # type: ignore[index]
            if family.size >= tp:
                ranks[family] = 1 << _owners(family, classes.groups(family), tp)
    ranks = spread_to_sources(ranks, classes.users, classes.sources)
    ranks[ranks == 0] = everywhere
    return ranks[classes.roots]


def _trouble(
    weights: list[fx.Node], facts: Facts, classes: Classes, ranks: np.ndarray, chosen: Iterable[object], tp: int
) -> tuple[fx.Node, list[Factor]] | None:
    """A value that the plan cannot lay out, with the one factor or the several that are at fault."""
    weight_layouts = set(weights)
    for node, value in facts.values.items():
        split = []
        for factor in value.factors:
            found = factor_shards(factor, ranks, tp)
            if found is None and len(factor.dims) > 1 and _ragged(factor, ranks, tp):
                return node, [factor]
            if found:
                split.append(factor)
        if len(split) > 1 and node in weight_layouts:
            return node, split
    return None


def _ragged(factor: Factor, ranks: np.ndarray, tp: int) -> bool:
    """Whether some rank's indices are not a product of per-dim sets (holding nothing is another matter)."""
    bits = ranks[factor.labels]
    for rank in range(tp):
        mask = (bits >> rank) & 1 == 1
        extents = [int(mask.any(axis=tuple(j for j in range(mask.ndim) if j != i)).sum()) for i in range(mask.ndim)]
        if int(np.prod(extents)) != int(mask.sum()):
            return True
    return False


def _decide(
    decision: Decision, weights: list[fx.Node], facts: Facts, classes: Classes, ranks: np.ndarray,
    gains: dict[int, float], chosen: set, banned: dict[int, str], tp: int,
) -> None:  # fmt: skip
    """Write down what becomes of the weights."""
    culprits = _culprits(facts, classes)
    for node in weights:
        name = str(node.target)
        split = {}
        for factor in facts.values[node].factors:
            split.update(factor_shards(factor, ranks, tp) or {})
        if split and all(s.covers for s in split.values()):
            decision.weight_layouts[name] = on_dims(Layout.of(split), facts.values[node].axes)
        else:
            decision.reasons[name] = _reason(node, facts, classes, gains, chosen, banned, culprits, tp)


def _culprits(facts: Facts, classes: Classes) -> dict[int, fx.Node]:
    """Per unit the first op that mixed several of its labels."""
    found: dict[int, fx.Node] = {}
    for node, mixed in facts.mixed.items():
        for labels in mixed:
            for unit in np.unique(classes.roots[labels.reshape(-1)[:4096]]):
                found.setdefault(int(unit), node)
    return found


def _reason(
    node: fx.Node, facts: Facts, classes: Classes, gains: dict[int, float], chosen: set, banned: dict[int, str],
    culprits: dict[int, fx.Node], tp: int,
) -> Reason:  # fmt: skip
    """Why a weight stays whole."""
    texts, limits, shared = [], {}, False
    used = where(next(iter(node.users), node))
    for factor in facts.values[node].factors:
        units = np.unique(classes.roots[factor.labels])
        c = int(classes.of_unit[units[0]])
        gain = gains.get(c, 0.0) > 0
        limit = None
        if len(units) < factor.labels.size and len(units) < tp and int(units[0]) in culprits:
            kept = f"{len(units)} units" if len(units) > 1 else "one piece"
            text, limit = f"{kept} for {tp} ranks, kept together by {where(culprits[int(units[0])])}", len(units)
        elif c in banned:
            text, limit = banned[c], 1
        elif classes.served[units].all():
            text, shared = "needed by every rank", True
        elif len(units) < tp:
            text, limit = f"{len(units)} units for {tp} ranks: {used}", len(units)
        elif not gain:
            text = "communication would cost more than is saved"
        elif c not in chosen:
            text = "what it multiplies is split along other dims, which saves more"
        else:
            continue
        texts.append(text)
        if limit is not None and gain:
            limits[text] = limit
    if len(shape(node)) == 1 and texts:  # a bias, a norm's weight: as the features are
        return Reason(f"runs along features that stay whole ({texts[0]})" if "kept together" in texts[0] else texts[0])
    limit = max(limits.values(), default=None)
    if limit is not None and (limit > 1 or not shared):
        return Reason(next(t for t in limits if limits[t] == limit), limit)
    return Reason("; ".join(dict.fromkeys(texts)) or "nothing to split")
