"""sharded_value: a captured value in the rewritten graph, and constants that differ between ranks."""

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
        """The value itself if all ranks have the same, else a PerRank."""
        return values[0] if all(v == values[0] for v in values) else PerRank(tuple(values))


@dataclass
class ShardedValue:
    """A captured value's node in the rewritten graph, and its layout there.

    Attributes:
        node: the rewritten node.
        layout: its layout on the value's own virtual dims.
        pending: whether it is a partial sum; then no dim is split.
        addend: for a partial sum, a replicated node to add once after the reduction.
    """

    node: fx.Node
    layout: Layout = WHOLE
    pending: bool = False
    addend: fx.Node | None = None


def varies(node: fx.Node) -> bool:
    """Whether a rewritten value is replicated, and its gradient is a partial sum (type R)."""
    return node.meta.get("state") == "split" and node.meta["layout"].whole
