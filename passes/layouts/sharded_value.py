"""Where a captured value stands in a rewritten graph, and what of that differs between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes.layouts.layout import WHOLE, Layout

__all__ = ["GROUP", "PerRank", "ShardedValue", "varies"]

GROUP = "tp"
"""The name of the group of all tensor-parallel ranks in a rewritten graph."""


@dataclass(frozen=True)
class PerRank:
    """A constant of the rewritten graph that differs between ranks: one entry for each."""

    values: tuple[Any, ...]

    @staticmethod
    def of(values: Sequence[Any]) -> Any:
        """The one value if all ranks have the same, else a PerRank."""
        return values[0] if all(v == values[0] for v in values) else PerRank(tuple(values))


@dataclass
class ShardedValue:
    """Where a captured value stands in the rewritten graph.

    Attributes:
        node: the rewritten node.
        layout: its layout on the value's own virtual dims.
        pending: whether it is a pending sum; then it is whole.
        addend: for a pending sum, a whole node to add once after the reduction.
    """

    node: fx.Node
    layout: Layout = WHOLE
    pending: bool = False
    addend: fx.Node | None = None


def varies(node: fx.Node) -> bool:
    """Whether a rewritten value is whole on every rank and its gradient is the sum of the ranks'."""
    return node.meta.get("state") == "split" and node.meta["layout"].whole
