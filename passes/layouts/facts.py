"""facts: the results of propagation over a captured graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from passes.layouts.axes import Dim
from passes.layouts.units import Factor, Units, Value

__all__ = ["Facts"]


@dataclass
class Facts:
    """The results of propagation over a graph.

    Attributes:
        units: the labels, and how they are united and serve each other.
        values: the labelled value of every tensor node.
        alignments: per node, how its operands' dims correspond (some rules keep other notes here).
        pending: per node, the labels that make its result a partial sum if they are split.
        exchanged: per node, the labels that, if they are split, make ranks exchange a few numbers a row.
        picked: per node, the labels from which it selects one; if they are split, other ranks need it too.
        wanted_whole: per node, the operands that it needs replicated.
        work: per node, its floating-point operations (a size) and the labels that divide them.
        mixed: per node, the labels that it unites because it mixes their indices.
    """

    units: Units = field(default_factory=Units)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    alignments: dict[fx.Node, Any] = field(default_factory=dict)
    pending: dict[fx.Node, list[np.ndarray]] = field(default_factory=dict)
    exchanged: dict[fx.Node, list[np.ndarray]] = field(default_factory=dict)
    picked: dict[fx.Node, list[np.ndarray]] = field(default_factory=dict)
    wanted_whole: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    work: dict[fx.Node, tuple[Dim, list[np.ndarray]]] = field(default_factory=dict)
    mixed: dict[fx.Node, list[np.ndarray]] = field(default_factory=dict)

    def mix(self, node: fx.Node, factor: Factor, dims: Sequence[int] | None = None) -> Factor | None:
        """Unite a factor's labels along dims (all of them by default) because ``node`` mixes them."""
        self.mixed.setdefault(node, []).append(factor.labels)
        return self.units.unite_along(factor, factor.dims if dims is None else dims)

    def opaque(self, node: fx.Node, operands: Sequence[fx.Node]) -> None:
        """Record that ``node`` needs these operands replicated."""
        self.wanted_whole.setdefault(node, []).extend(operands)


def without(node: fx.Node, value: Value, dims: Iterable[int], facts: Facts) -> Value:
    """The value without labels on ``dims``, because ``node`` mixes them."""
    inside = {v for d in dims for v in value.virtual(d)}
    mixed = [[v for v in f.dims if v in inside] for f in value.factors]
    factors = [facts.mix(node, f, own) if own else f for f, own in zip(value.factors, mixed, strict=True)]
    return Value(value.axes, tuple(f for f in factors if f is not None))
