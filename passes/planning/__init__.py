"""Which dims to split, among which ranks, and what that costs.

The hardware model, the choice and its reasons are changed here. A plan is decided from labels and costs alone: it
reads no name of a module or parameter, and knows an op only by its rule.
"""

from passes.planning.assign import assign
from passes.planning.cost import CostModel
from passes.planning.decide import Decision, decide
from passes.planning.minimum import Minimum, minimum
from passes.planning.propagate import propagate
from passes.planning.reasons import Reason

__all__ = ["CostModel", "Decision", "Minimum", "Reason", "assign", "decide", "minimum", "propagate"]
