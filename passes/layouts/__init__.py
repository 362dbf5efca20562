"""Which indices of a value each rank holds, and the labels that layouts are found by.

The data structures of all passes are changed here. They are values: nothing here knows an op or walks a graph.
"""

from passes.layouts.axes import Axes, Size
from passes.layouts.layout import WHOLE, IndexSet, Layout, Shards
from passes.layouts.sharded_value import PerRank

__all__ = ["WHOLE", "Axes", "IndexSet", "Layout", "PerRank", "Shards", "Size"]
