"""persistent_state: the layouts of inputs and results that stay split between calls, such as cached keys and values.

A *slot* is a place where one call leaves a result and a later call finds it as an input. A captured input carries the
name of its slot in ``meta["slot"]``; the output node carries the names of its results' slots in ``meta["slots"]``, by
position. So a slot has one layout. The first call that uses the slot decides it, and it splits a single dim at most.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from passes.graphs import shape
from passes.layouts.axes import Size
from passes.layouts.layout import Layout

__all__ = ["settled_layout"]


def settled_layout(node: fx.Node, slots: Mapping[str, Layout], name: str | None = None) -> Layout | None:
    """The layout that a slot already has; None where it has none, or one that this value cannot have.

    Args:
        node: the captured input or result.
        slots: the layouts of slots, by name.
        name: the slot's name, for a result.
    """
    layout = slots.get(name or node.meta.get("slot", ""))
    sizes = shape(node)
    if layout is None or any(d >= len(sizes) or sizes[d] != Size(s.size) for d, s in layout.shards):
        return None
    return layout
