"""layouts: which indices of a value each rank holds, and the labels from which planning derives layouts.

These are the data structures that all passes share. They are values: nothing here knows an op or walks a graph.
"""

from passes.layouts.axes import Axes, Size
from passes.layouts.layout import WHOLE, IndexSet, Layout, Shards
from passes.layouts.sharded_value import PerRank

__all__ = ["WHOLE", "Axes", "IndexSet", "Layout", "PerRank", "Shards", "Size"]
