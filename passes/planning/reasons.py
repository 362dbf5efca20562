"""reasons: why a weight stays unsplit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from passes.graphs import shape, where
from passes.layouts.facts import Facts
from passes.planning.classes import Classes

__all__ = ["Choice", "Reason", "confirm_limits", "reasons_for"]


@dataclass(frozen=True)
class Reason:
    """Why a weight stays unsplit.

    Attributes:
        text: the reason, for a person.
        limit: where the weight has too few pieces for these ranks, the number of its pieces, which is the most ranks
            that it can be split for (1: it has no pieces); None where every rank needs all of it, or splitting it
            does not pay.
    """

    text: str
    limit: int | None = None


@dataclass(frozen=True)
class Choice:
    """The classes that are split, and the grounds of the choice.

    Attributes:
        facts: the facts from :func:`passes.propagate` about the captured graph.
        classes: the classes of its units.
        gains: the gain of splitting each class.
        chosen: the classes that are split.
        banned: the classes that cannot be split, each with the reason.
        tp: the number of ranks.
    """

    facts: Facts
    classes: Classes
    gains: Mapping[int, float]
    chosen: Collection[object]
    banned: Mapping[int, str]
    tp: int


def reasons_for(weights: Collection[fx.Node], choice: Choice) -> dict[str, Reason]:
    """Why each of these weights stays unsplit, by ``get_attr`` target."""
    mixers = _mixers(choice)
    return {str(node.target): _reason(node, choice, mixers) for node in weights}


def _mixers(choice: Choice) -> dict[int, fx.Node]:
    """Per unit the first op that mixed several of its labels."""
    mixers: dict[int, fx.Node] = {}
    for node, mixed in choice.facts.mixed.items():
        for labels in mixed:
            for unit in np.unique(choice.classes.roots[labels.reshape(-1)[:4096]]):
                mixers.setdefault(int(unit), node)
    return mixers


def _reason(node: fx.Node, choice: Choice, mixers: Mapping[int, fx.Node]) -> Reason:
    """Why a weight stays unsplit."""
    classes, tp = choice.classes, choice.tp
    texts: list[str] = []
    limits: dict[str, int] = {}
    shared = False
    user = where(next(iter(node.users), node))
    for factor in choice.facts.values[node].factors:
        units = np.unique(classes.roots[factor.labels])
        c = int(classes.of_unit[units[0]])
        gain = choice.gains.get(c, 0.0) > 0
        limit = None
        if len(units) < factor.labels.size and len(units) < tp and int(units[0]) in mixers:
            pieces = f"{len(units)} units" if len(units) > 1 else "one piece"
            text, limit = f"{pieces} for {tp} ranks, kept together by {where(mixers[int(units[0])])}", len(units)
        elif c in choice.banned:
            text, limit = choice.banned[c], 1
        elif classes.is_source[units].all():
            text, shared = "needed by every rank", True
        elif len(units) < tp:
            text, limit = f"{len(units)} units for {tp} ranks: {user}", len(units)
        elif not gain:
            text = "communication would cost more than is saved"
        elif c not in choice.chosen:
            text = "what it multiplies is split along other dims, which saves more"
        else:
            continue
        texts.append(text)
        if limit is not None and gain:
            limits[text] = limit
    if len(shape(node)) == 1 and texts:  # a bias, a norm's weight: as the features are
        return Reason(
            f"runs along features that stay unsplit ({texts[0]})" if "kept together" in texts[0] else texts[0]
        )
    most = max(limits.values(), default=None)
    if most is not None and (most > 1 or not shared):
        return Reason(next(t for t in limits if limits[t] == most), most)
    return Reason("; ".join(dict.fromkeys(texts)) or "nothing to split")


def confirm_limits(reasons: Mapping[str, Reason], split_weights: Callable[[int], Collection[str]]) -> dict[str, Reason]:
    """Drop a reason's limit if planning for that many ranks still leaves the weight unsplit.

    Args:
        reasons: why each weight stays unsplit, by name.
        split_weights: the names of the weights that are split among a number of ranks.
    """
    limits = {reason.limit for reason in reasons.values()} - {None, 1}
    split = {limit: split_weights(limit) for limit in limits if limit is not None}
    return {
        name: reason if name in split.get(reason.limit or 0, {name}) else replace(reason, limit=None)
        for name, reason in reasons.items()
    }
