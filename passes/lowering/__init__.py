"""The passes that make a rank's graph fast, in the order in which they run.

=================  ==================================================================================
``fold``           what computes nothing, or the same in every call, is gone
``causal``         masks that say "no later keys", or nothing, are not made
``deduplicate``    what is computed twice is computed once
``grouped_query``  attention reads a key-value head once for all the query heads that share it
``fuse``           norms and activations that are written out are one op
``merge``          Linears of one input are one product
``fuse_adjacent``  what is done alike to adjacent parts of a value is done once
``split``          parts that make up a whole are cut out in one call
``rematerialize``  with a backward, norms and gated activations keep only what they are made of
``cache_in_place`` without a backward, caches get new tokens without being copied
``overlap``        what needs no sum over the ranks is computed while that is under way
``reuse``          without a backward, results go where an operand was that nothing reads any more
``direct_calls``   ops are called as torch's C functions
``repeat``         for a compiler, layers that are alike are calls of one region
=================  ==================================================================================

:func:`passes.lower` runs them. Each changes a graph in place, keeps its result and the order of its collectives, and
returns how often it applied. A pass is added as a file of its own and a line in ``lower.py``. It must know nothing of
processes, nor of how layouts were decided.
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
