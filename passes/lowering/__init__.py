"""The passes that make a rank's graph fast, in the order in which they run.

=================  ==================================================================================
``causal``         attention gets ``is_causal``, or no mask, in place of masks that say no more
``fold``           no-ops are removed, and constants are computed once
``deduplicate``    equal calls are one call
``grouped_query``  attention reads a key-value head once for all the query heads that share it
``fuse``           norms and activations that are written out are one op
``merge``          Linears with one input are one product
``fuse_adjacent``  equal ops on adjacent slices of a value are one op on all of them
``split``          slices that together are a value become one ``split_with_sizes``
``rematerialize``  with a backward, norms and gated activations save only their inputs for it
``cache_in_place`` without a backward, caches take new tokens in place
``overlap``        computation runs beside an all-reduce whose result it does not need
``reuse``          without a backward, results are written over operands that nothing reads any more
``direct_calls``   ops are called as torch's C functions
``repeat``         for a compiler, equal layers are calls of one region
=================  ==================================================================================

:func:`passes.lower` runs them. Each changes a graph in place, keeps the graph's results and the order of its
collectives, and returns how often it applied. A new pass is a file of its own and a line in ``lower.py``. Passes know
nothing of processes, nor of how layouts were decided.
"""

from passes.lowering.cache_in_place import cache_in_place
from passes.lowering.causal import causal
from passes.lowering.deduplicate import deduplicate
from passes.lowering.direct_calls import direct_calls
from passes.lowering.fold import fold
from passes.lowering.fuse import fuse
from passes.lowering.fuse_adjacent import fuse_adjacent
from passes.lowering.grouped_query import grouped_query
from passes.lowering.lower import Lowered, Lowering, lower
from passes.lowering.merge import merge
from passes.lowering.overlap import overlap
from passes.lowering.rematerialize import rematerialize
from passes.lowering.repeat import repeat
from passes.lowering.reuse import reuse
from passes.lowering.split import split

__all__ = [
    "Lowered",
    "Lowering",
    "cache_in_place",
    "causal",
    "deduplicate",
    "direct_calls",
    "fold",
    "fuse",
    "fuse_adjacent",
    "grouped_query",
    "lower",
    "merge",
    "overlap",
    "rematerialize",
    "repeat",
    "reuse",
    "split",
]
