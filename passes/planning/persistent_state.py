"""slots: inputs and results that ranks keep in parts between calls, such as cached keys and values.

A captured input that stays split carries the name of its slot in ``meta["slot"]``, and the output node the names
of the results' in ``meta["slots"]``, by position. What one call leaves in a slot another finds there, so a slot
has one layout, which the first call that meets it decides. It is one that splits a single dim.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from passes.graphs import shape
from passes.layouts.axes import Size
from passes.layouts.layout import Layout

__all__ = ["settled_layout"]


def settled_layout(node: fx.Node, slots: Mapping[str, Layout], name: str | None = None) -> Layout | None:
    """The layout that a slot has already; None where it has none yet, or one that this value cannot have.

    Args:
        node: the captured input or result.
        slots: the layouts of slots, by name.
        name: the slot's, for a result.
    """
    layout = slots.get(name or node.meta.get("slot", ""))
    sizes = shape(node)
    if layout is None or any(d >= len(sizes) or sizes[d] != Size(s.size) for d, s in layout.shards):
        return None
    return layout
