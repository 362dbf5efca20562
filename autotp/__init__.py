"""autotp: tensor parallelism for any dense PyTorch transformer, from its dataflow alone.

>>> model = autotp.parallelize(model, tp=4)  # under torchrun --nproc-per-node 4

The packages and files, from top to bottom. Each imports only from those below it, and from ``passes``:

================  =================================================================================
``cli``           the command line
``fuzz``          random models, to find failures of autotp
``verification``  comparison of the dense model with its parallel form
``parallel``      ``parallelize``, step by step
``integrations``  what users do with a model besides calling it
``inspection``    graph, full state dict and full gradients of a parallelized model
``saving``        checkpoints of the dense model, written by all ranks together
``plans``         the plan of a model, and warnings about weights that stay unsplit
``partition``     the largest capturable modules of a model, and how they run
``runtime``       one call of a parallelized module
``program``       from a captured graph to one rank's program
``capture``       one call of a module as one functional graph
``arguments``     a call's arguments as flat tensors, and mutations of them
``weights``       parameters, checkpoints, optimizer state, gradient norms as shards
``distributed``   processes, collectives, agreement, random streams
``modules``       checks and changes of ``nn.Module`` objects
``utils``         hashes, generated code, tables, kinds of values
``options``       the choices of a user of ``parallelize``, as one value
``errors``        the public errors and warnings
``version``       the version, written once
================  =================================================================================

Each public name is imported when it is first used. So the command line prints its help and usage errors without
importing torch, which takes seconds.
"""

from typing import TYPE_CHECKING

from autotp.version import __version__ as __version__

if TYPE_CHECKING:
    from autotp.arguments.object_tree import sharded_state
    from autotp.distributed.tally import Tally
    from autotp.errors import (
        AutoTPError,
        CaptureError,
        LaunchError,
        LocalStateWarning,
        MismatchError,
        PartialCaptureWarning,
        PlanError,
        ProofError,
        UnprovedWarning,
        UntestedOptimizerWarning,
        WeightsError,
        WholeWeightWarning,
    )
    from autotp.inspection import full_gradients, full_state_dict, graph
    from autotp.parallel import parallelize
    from autotp.plans.make_plan import make_plan as plan
    from autotp.plans.plan import Plan
    from autotp.saving.save import save
    from autotp.verification.report import Report
    from autotp.verification.simulation import Simulation, simulate
    from autotp.verification.verify import verify
    from autotp.weights.empty_weights import empty_weights
    from autotp.weights.parameters_norm import parameters_norm
    from passes import Lowering

__all__ = [
    "AutoTPError",
    "CaptureError",
    "LaunchError",
    "LocalStateWarning",
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
    "UntestedOptimizerWarning",
    "WeightsError",
    "WholeWeightWarning",
    "empty_weights",
    "full_gradients",
    "full_state_dict",
    "graph",
    "parallelize",
    "parameters_norm",
    "plan",
    "save",
    "sharded_state",
    "simulate",
    "verify",
]

_SOURCES = {
    **dict.fromkeys([name for name in __all__ if name.endswith(("Error", "Warning"))], "autotp.errors"),
    "Lowering": "passes",
    "Plan": "autotp.plans.plan",
    "Report": "autotp.verification.report",
    "Simulation": "autotp.verification.simulation",
    "Tally": "autotp.distributed.tally",
    "empty_weights": "autotp.weights.empty_weights",
    "full_gradients": "autotp.inspection",
    "full_state_dict": "autotp.inspection",
    "graph": "autotp.inspection",
    "parallelize": "autotp.parallel",
    "parameters_norm": "autotp.weights.parameters_norm",
    "plan": "autotp.plans.make_plan:make_plan",
    "save": "autotp.saving.save",
    "sharded_state": "autotp.arguments.object_tree",
    "simulate": "autotp.verification.simulation",
    "verify": "autotp.verification.verify",
}
"""The module that defines each public name, with ``:name`` if it has another name there."""


if not TYPE_CHECKING:  # type checkers would accept any name of a module that has it

    def __getattr__(name: str) -> object:
        """A public name, or a package or file of autotp, at its first use."""
        from importlib import import_module

        if name in _SOURCES:
            module, _, attribute = _SOURCES[name].partition(":")
            value = getattr(import_module(module), attribute or name)
            globals()[name] = value
            return value
        if not name.startswith("_"):
            try:
                return import_module(f"autotp.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"autotp.{name}":
                    raise
        raise AttributeError(f"module 'autotp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
