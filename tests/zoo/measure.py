"""One architecture, dense against autotp at every number of ranks: the row of the table."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from autotp.capture import Dense, capture
from autotp.errors import AutoTPError
from autotp.plan import Plan, plan_of
from autotp.rewrite import rewrite
from autotp.simulate import Simulation
from autotp.verify import Float64, compare
from tests.passes.harness import OneProgram
from tests.zoo.architectures import Architecture
from tests.zoo.small import VOCABULARY

TPS = (2, 3, 4, 8)
TOLERANCE = 1e-9


@dataclass
class At:
    """What was found at one number of ranks."""

    ok: bool
    error: str = ""
    share: float = 0.0
    vocabulary: bool = False
    forward: int = 0
    backward: int = 0
    minimum: tuple[int, int] = (0, 0)
    whole: list[str] = field(default_factory=list)
    gathered: list[str] = field(default_factory=list)


@dataclass
class Row:
    """One architecture's row.

    Attributes:
        name: ``kind/type``.
        dense_error: why the dense model itself does not run here, if it does not.
        capture_error: why autotp does not run it, if it does not.
        at: what was found, by number of ranks.
        seconds: how long it took.
    """

    name: str
    dense_error: str = ""
    capture_error: str = ""
    at: dict[str, At] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(architecture: Architecture, tps: Iterable[int] = TPS) -> Row:
    """Build, capture once, and compare at each number of ranks."""
    row, start = Row(str(architecture)), time.monotonic()
    try:
        with Float64():
            model, inputs = architecture.build()
            model(**inputs)
    except Exception as error:
        row.dense_error = _said(error)
        return row
    with Float64():
        try:
            captured = capture(model, (), inputs)
        except AutoTPError as error:
            row.capture_error = str(error)
            return row
        for tp in tps:
            try:
                program = rewrite(captured, tp)
                plan = plan_of(program, model, Dense.of(model))
                simulation = Simulation(model, tp, OneProgram(model, program), record=True)
                report = compare(model, simulation, (), inputs, TOLERANCE)
                row.at[str(tp)] = at = _of_plan(plan)
                at.ok = report.ok
                at.minimum = (len(program.minimum.forward), len(program.minimum.backward))
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


def _said(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename.split('/')[-1]}:{frame.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({place})"


def _of_plan(plan: Plan) -> At:
    layers = [w for w in plan.weights if len(w.shape) > 1 and re.search(r"\.\d+\.", w.name)]
    words = [w for w in plan.weights if len(w.shape) == 2 and VOCABULARY in w.shape]
    total = sum(w.elements for w in layers)
    return At(
        True,
        share=sum(w.elements for w in layers if w.shards) / total if total else 1.0,
        vocabulary=all(w.shards and w.shape[next(iter(w.shards))] == VOCABULARY for w in words),
        forward=plan.count("forward"),
        backward=plan.count("backward"),
        whole=[f"{w.name} {w.shape}: {w.why}" for w in layers + words if not w.shards],
        gathered=list(plan.gathered),
    )
