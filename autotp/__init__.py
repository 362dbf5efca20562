"""autotp: tensor parallelism for any dense PyTorch transformer, from its dataflow alone.

>>> model = autotp.parallelize(model, tp=4)  # under torchrun --nproc-per-node 4

The packages and files, from top to bottom; each imports only from those below it, and from ``passes``:

================  =================================================================================
``cli``           the command line
``fuzz``          random models, to find what breaks autotp
``verification``  dense against parallel, in numbers
``parallel``      ``parallelize``: the whole way of a model, step by step
``inspection``    graph, full state dict and full gradients of a parallelized model
``plans``         the plan as a value, and what a user is told about it
``partition``     models that are captured in parts
``runtime``       one call of a parallelized module
``program``       from a captured graph to the program that one rank runs
``capture``       one call of a module as one functional graph
``arguments``     a call's arguments as flat tensors, and what a call mutates
``weights``       parameters, checkpoints, optimizer state, gradient norms as shards
``distributed``   processes, collectives, agreement, random streams
``modules``       what autotp asks of and does to ``nn.Module``
``utils``         hashes, generated code, tables, kinds of values
``errors``        the public errors and warnings
================  =================================================================================
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
