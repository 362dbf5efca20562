"""One architecture, dense against autotp at every number of ranks: the row of the table."""

from __future__ import annotations

import re
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autotp.capture.capture import capture
from autotp.capture.captured_graph import CapturedGraph
from autotp.errors import CaptureError
from autotp.modules.names import block_of
from autotp.partition.module_calls import Call
from autotp.partition.partition import Partition, partition_into_modules
from autotp.plans.make_plan import plan_of
from autotp.plans.plan import Plan
from autotp.program.sharded_program import shard_graph
from autotp.verification.measure import Float64
from autotp.verification.simulation import Simulation
from autotp.verification.verify import compare
from passes.graphs import is_tensor, module_path, op_name
from tests.passes.harness import OneProgram
from tests.zoo.architectures import Architecture, architectures
from tests.zoo.small import VOCABULARY

TPS = (2, 3, 4, 8)
TOLERANCE = 1e-9
LIMIT = 480.0
"""Seconds for one architecture."""
MEMORY = 11 << 30
"""Bytes of address space for one process."""
ROUTES = {"topk", "sort", "_grouped_mm", "argsort", "argmax"}
RECURS = {"conv1d", "cumsum", "logcumsumexp", "fft_fft", "fft_fftn", "fft_rfft"}


@dataclass
class At:
    """What was found at one number of ranks.

    Attributes:
        ok: whether outputs, loss, every gradient agree and ranks agree to the bit.
        error: what is wrong otherwise.
        unproved: what the static proof refuses, if it does.
        share: of the elements of the layers' matrices that the call uses, those split, key-value replicas aside.
        vocabulary: whether embedding and head are split over the vocabulary.
        forward: collectives of a forward.
        backward: collectives of a backward.
        minimum: the fewest that the layouts leave possible, forward and backward.
        per_layer: collectives a layer, forward and backward.
        whole: the matrices that stay whole, and why.
    """

    ok: bool
    error: str = ""
    unproved: str = ""
    share: float = 0.0
    vocabulary: bool = False
    forward: int = 0
    backward: int = 0
    minimum: tuple[int, int] = (0, 0)
    per_layer: tuple[float, float] = (0.0, 0.0)
    whole: list[str] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether this is all that is asked of a dense architecture."""
        fewest = self.forward <= self.minimum[0] and self.backward <= self.minimum[1]
        return self.ok and not self.unproved and self.share >= 0.99 and self.vocabulary and fewest


@dataclass
class Row:
    """One architecture's row.

    Attributes:
        name: ``kind/type``.
        kind: ``dense``, ``mixture of experts`` (routes by values), ``recurrent`` (scans, convolutions, transforms),
            ``not run`` (not even dense).
        dense_error: why the dense model itself does not run here, if it does not.
        capture_error: why autotp does not run it, if it does not.
        seams: where capture ended, for a model that runs in parts.
        at: what was found, by number of ranks.
        seconds: how long it took.
    """

    name: str
    kind: str = "not run"
    dense_error: str = ""
    capture_error: str = ""
    seams: list[str] = field(default_factory=list)
    at: dict[str, At] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Row:
        """The row that :meth:`to_json` wrote."""
        at = {tp: At(**{**each, "minimum": tuple(each["minimum"]), "per_layer": tuple(each["per_layer"])})
              for tp, each in data["at"].items()}  # fmt: skip
        return Row(**{**data, "at": at})


def measure(architecture: Architecture, tps: Iterable[int] = TPS) -> Row:
    """Build, capture once, and compare at each number of ranks."""
    row, start = Row(str(architecture)), time.monotonic()
    try:
        with Float64():
            model, inputs = architecture.build()
            with Called() as called:
                outputs = model(**inputs)
            values = [v for v in tree_leaves(outputs) if isinstance(v, torch.Tensor) and v.requires_grad]
            torch.autograd.backward([v.sum() for v in values])
    except Exception as error:
        row.dense_error = _said(error)
        return row
    with Float64():
        failed: CaptureError | None = None
        try:
            captured = capture(model, (), inputs)
            if not isinstance(captured, CapturedGraph):
                raise captured.error()
            row.kind = _kind(_computed(captured.graph))
        except CaptureError as error:
            row.kind, row.seams, failed = _kind(called.names), [" ".join(str(error).split())[:200]], error
        except Exception as error:
            row.kind, row.capture_error = _kind(called.names), _said(error)
            return row
        for tp in tps:
            try:
                if failed is None:
                    program = shard_graph(captured, tp)
                    division = Partition.whole(model, OneProgram(model, program), [Call((), inputs)])
                else:
                    division = partition_into_modules(model, tp, (), inputs, failed)
                    row.seams = [str(seam) for seam in division.graph_breaks]
                plan = plan_of(division, tp)
                report = compare(model, Simulation(model, tp, division, record=True), (), inputs, TOLERANCE)
                row.at[str(tp)] = at = _of_plan(plan)
                at.ok, at.unproved = report.ok, _refused(division)
                if not at.ok:
                    name, worst = report.worst_gradient
                    at.error = (
                        f"outputs off by {report.worst_output:.1e}, gradient of {name} by {worst:.1e}, ranks differ by "
                        f"{report.divergence:.1e} in {report.diverging}, missing {report.missing[:3]}"
                    )
            except Exception as error:
                row.at[str(tp)] = At(False, _said(error))
    row.seconds = time.monotonic() - start
    return row


def measure_named(name: str) -> dict[str, Any]:
    """The row of an architecture by name, as plain data, in a worker process and within ``LIMIT``."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT:g} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        (architecture,) = (a for a in architectures() if str(a) == name)
        return measure(architecture).to_json()
    except Exception as error:
        return Row(name, "dense", capture_error=_said(error)).to_json()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def send_measured(name: str, connection: Connection) -> None:
    """:func:`measure_named`, to the other end of a pipe."""
    connection.send(measure_named(name))


class Called(TorchFunctionMode):
    """Notes which functions are called on tensors that need gradients, and which choose among floating ones."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = getattr(func, "__name__", ""), [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        if any(x.requires_grad or (name in ROUTES and x.is_floating_point()) for x in tensors):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def _computed(graph: fx.Graph) -> set[str]:
    """The ops that a graph's layers compute with gradients, and those that choose among floating values."""
    names: set[str] = set()
    for node in graph.nodes:
        name = op_name(node).rpartition(".")[2]
        inputs = [i for i in node.all_input_nodes if is_tensor(i)] if _layer(module_path(node)) else []
        if any(i.meta.get("grad") or (name in ROUTES and i.meta["val"].is_floating_point()) for i in inputs):
            names.add(name)
    return names


def _kind(names: set[str]) -> str:
    """What an architecture is, by what it computes with gradients."""
    return "mixture of experts" if names & ROUTES else "recurrent" if names & RECURS else "dense"


def _layer(path: str) -> str:
    """The repeated block that a module path lies in, with its number; nothing outside of layers."""
    found = re.match(r"(.*?\.\d+)(\.|$)", path)
    return found[1] if found else ""


def _refused(division: Partition) -> str:
    """The first refusal of the proof, of a model in one part or several."""
    verdicts = [part.cache.last.verdict for part in division.parts if part.cache.last is not None]
    assert verdicts, "there is nothing to prove"
    return next((str(verdict) for verdict in verdicts if not verdict.proved), "")


def _said(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename.split('/')[-1]}:{frame.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({place})"


def _of_plan(plan: Plan) -> At:
    used = [w for w in plan.weights if len(w.shape) > 1 and w.why != "not used in the captured call"]
    layers = [w for w in used if _layer(w.name) and not w.why.startswith("needed by every rank")]
    words = [w for w in used if len(w.shape) == 2 and VOCABULARY in w.shape]
    total = sum(w.elements for w in layers)
    blocks = {_layer(w.name) for w in layers}
    inside = [c.when for c in plan.collectives if _layer(c.module)]
    return At(
        True,
        share=round(sum(w.elements for w in layers if w.shards) / total, 4) if total else 1.0,
        vocabulary=all(w.shards and w.shape[next(iter(w.shards))] == VOCABULARY for w in words),
        forward=plan.count("forward"),
        backward=plan.count("backward"),
        minimum=(plan.fewest["forward"][0], plan.fewest["backward"][0]),
        per_layer=tuple(round(inside.count(when) / max(len(blocks), 1), 2) for when in ("forward", "backward")),
        whole=sorted({f"{block_of(w.name)} {w.shape}: {w.why}" for w in layers + words if not w.shards}),
    )
