"""autotp: tensor parallelism for any dense PyTorch transformer, from its dataflow alone.

>>> model = autotp.parallelize(model, tp=4)  # under torchrun --nproc-per-node 4
"""

from autotp.empty import empty_weights
from autotp.errors import (
    AutoTPError,
    CaptureError,
    LaunchError,
    MismatchError,
    PartialCaptureWarning,
    PlanError,
    ProofError,
    UnprovedWarning,
    WeightsError,
    WholeWeightWarning,
)
from autotp.parallel import full_gradients, full_state_dict, graph, parallelize
from autotp.plan import Plan
from autotp.planning import make_plan as plan
from autotp.simulate import Simulation, simulate
from autotp.states import sharded_state
from autotp.tally import Tally
from autotp.verify import Report, verify
from passes import Lowering

__all__ = [
    "AutoTPError",
    "CaptureError",
    "LaunchError",
    "Lowering",
    "MismatchError",
    "PartialCaptureWarning",
    "Plan",
    "PlanError",
    "ProofError",
    "Report",
    "Simulation",
    "Tally",
    "UnprovedWarning",
    "WeightsError",
    "WholeWeightWarning",
    "empty_weights",
    "full_gradients",
    "full_state_dict",
    "graph",
    "parallelize",
    "plan",
    "sharded_state",
    "simulate",
    "verify",
]
