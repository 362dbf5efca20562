"""autotp: tensor parallelism for any dense PyTorch transformer, from its dataflow alone.

>>> model = autotp.parallelize(model, tp=4)  # under torchrun --nproc-per-node 4
"""

from autotp.arguments.object_tree import sharded_state
from autotp.distributed.tally import Tally
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
from autotp.inspection import full_gradients, full_state_dict, graph
from autotp.parallel import parallelize
from autotp.plans.make_plan import make_plan as plan
from autotp.plans.plan import Plan
from autotp.verification.report import Report
from autotp.verification.simulation import Simulation, simulate
from autotp.verification.verify import verify
from autotp.weights.empty_weights import empty_weights
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
