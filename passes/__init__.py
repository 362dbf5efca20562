"""passes: the compiler of autotp. Pure functions on graphs, without process groups and without ``autotp``.

The packages, from top to bottom; each imports only from those below it:

=============  ======================================================================================
``sharding``   the rewritten graph for all ranks, and one rank's
``planning``   which dims to split, and among which ranks
``rules``      one rule an op, for planning and sharding
``normalize``  the captured graph in a normal form
``proof``      the independent proof
``lowering``   one rank's graph made fast
``ops``        the ops that rewritten graphs call
``graphs``     small helpers on fx graphs
``layouts``    which indices each rank holds
=============  ======================================================================================

The passes, in the order in which they run:

=================  ==================================================================================
``inline``         no-grad regions hide no nodes
``functionalize``  no node mutates another's value
``differentiable`` which nodes gradients flow through
``simplify``       no node computes nothing
``canonicalize``   one spelling for each way to slice, join, repeat and fill tensors
``propagate``      which indices of which values must stay together (rules: :mod:`passes.rules`)
``decide``         which of those to split, and among which ranks
``assign``         each value's layout from the weights' layouts
``shard``          the rewritten graph for all ranks, with its collectives
``enter``          where replicated values enter computation on shards, for complete gradients
``check``          a proof that the result computes the captured graph, by rules of its own (:mod:`passes.proof`)
``localize``       one rank's graph
``lower``          the same, faster (passes of its own: :mod:`passes.lowering`)
``minimum``        the fewest collectives possible with these layouts, to compare the result with
=================  ==================================================================================
"""

from passes.layouts.layout import IndexSet, Layout, Shards
from passes.lowering.lower import Lowered, Lowering, lower
from passes.normalize.canonicalize import canonicalize
from passes.normalize.differentiable import differentiable
from passes.normalize.functionalize import functionalize
from passes.normalize.inline import inline
from passes.normalize.simplify import simplify
from passes.planning.assign import assign
from passes.planning.decide import Decision, decide
from passes.planning.minimum import Minimum, minimum
from passes.planning.propagate import propagate
from passes.planning.reasons import Reason
from passes.proof.check import Verdict, check
from passes.sharding.enter import enter
from passes.sharding.localize import localize
from passes.sharding.shard import shard

__all__ = [
    "Decision",
    "IndexSet",
    "Layout",
    "Lowered",
    "Lowering",
    "Minimum",
    "Reason",
    "Shards",
    "Verdict",
    "assign",
    "canonicalize",
    "check",
    "decide",
    "differentiable",
    "enter",
    "functionalize",
    "inline",
    "localize",
    "lower",
    "minimum",
    "propagate",
    "shard",
    "simplify",
]
