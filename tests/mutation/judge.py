"""What becomes of a mutant: whether its numbers differ from the dense model's, and whether the proof refuses it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotp.capture.capture import capture
from autotp.capture.captured_graph import CapturedGraph
from autotp.program.sharded_program import ShardedProgram, shard_graph
from autotp.verification.measure import Float64
from autotp.verification.simulation import Simulation
from autotp.verification.verify import compare
from passes import Verdict, check
from tests.models import make
from tests.mutation.mutants import Mutant, mutants
from tests.passes.harness import OneProgram

__all__ = ["FATES", "Subject", "judged", "subject"]


FATES = {
    (True, False): "refused",
    (True, True): "got through",
    (False, True): "equivalent",
    (False, False): "refused though equal",
}
"""By whether the numbers differ, and whether it is proved."""


@dataclass
class Subject:
    """A model, its capture, and its program for some ranks, which is proved."""

    model: nn.Module
    inputs: dict[str, Any]
    captured: CapturedGraph
    program: ShardedProgram

    def verdict(self, program: ShardedProgram) -> Verdict:
        """What the proof says of a program."""
        return check(self.captured.graph, program.graph, program.weight_layouts, self.captured.parameters, program.tp)

    def differs(self, program: ShardedProgram) -> bool:
        """Whether a program fails, or gives other values or gradients than the dense model."""
        parallel = Simulation(self.model, program.tp, OneProgram(self.model, program), record=True)
        with Float64():
            try:
                return not compare(self.model, parallel, (), self.inputs).ok
            except Exception:  # of any kind: shapes that no longer fit, indices out of range
                return True

    def mutants(self) -> Iterator[Mutant]:
        """All ways to break the program."""
        return mutants(self.program)


def _from_zoo(name: str) -> tuple[nn.Module, dict[str, Any]]:
    from tests.zoo.architectures import architectures

    return next(a for a in architectures() if str(a) == name).build()


@functools.cache
def subject(name: str, tp: int) -> Subject:
    """One of :mod:`tests.models`, or of the zoo (``causal/olmo2``), for some ranks."""
    with Float64():
        model, inputs = _from_zoo(name) if "/" in name else make(name)
        captured = capture(model, (), inputs)
    return Subject(model, inputs, captured, shard_graph(captured, tp))


def judged(each: str) -> tuple[str, Counter[tuple[str, str]], list[str]]:
    """All mutants of one subject: how many of each kind met which fate, and those that get through."""
    torch.set_num_threads(1)
    name, _, tp = each.partition(":")
    it, count, through = subject(name, int(tp)), Counter[tuple[str, str]](), []
    assert it.verdict(it.program).proved, it.verdict(it.program)
    for mutant in it.mutants():
        differs, proved = it.differs(mutant.program), it.verdict(mutant.program).proved
        count[mutant.kind, FATES[differs, proved]] += 1
        if differs and proved:
            through.append(f"{each}: {mutant.kind} at {mutant.place}")
    return each, count, through
