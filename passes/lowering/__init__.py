"""The passes that make a rank's graph fast, in the order in which they run.

=================  ==================================================================================
``fold``           what computes nothing, or the same in every call, is gone
``causal``         masks that say "no later keys", or nothing, are not made
``deduplicate``    what is computed twice is computed once
``group``          attention reads a key-value head once for all the query heads that share it
``fuse``           norms and activations that are written out are one op
``merge``          Linears of one input are one product
``together``       what is done alike to adjacent parts of a value is done once
``split``          parts that make up a whole are cut out in one call
``lean``           with a backward, norms and gated activations keep only what they are made of
``grow``           without a backward, caches get new tokens without being copied
``overlap``        what needs no sum over the ranks is computed while that is under way
``reuse``          without a backward, results go where an operand was that nothing reads any more
``bind``           ops are called as torch's C functions
``repeat``         for a compiler, layers that are alike are calls of one region
=================  ==================================================================================

:func:`passes.lower` runs them. Each changes a graph in place, keeps what it computes, keeps the order in which
ranks meet, and returns how much it found.
"""

from passes.lowering.bind import bind
from passes.lowering.causal import causal
from passes.lowering.deduplicate import deduplicate
from passes.lowering.fold import fold
from passes.lowering.fuse import fuse
from passes.lowering.group import group
from passes.lowering.grow import grow
from passes.lowering.lean import lean
from passes.lowering.merge import merge
from passes.lowering.overlap import overlap
from passes.lowering.repeat import repeat
from passes.lowering.reuse import reuse
from passes.lowering.split import split
from passes.lowering.together import together

__all__ = ["bind", "causal", "deduplicate", "fold", "fuse", "group", "grow", "lean", "merge", "overlap", "repeat",
           "reuse", "split", "together"]  # fmt: skip
