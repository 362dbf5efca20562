"""A sample of the mutants: what the proof lets through gives the dense model's numbers."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.mutation.judge import subject
from tests.mutation.mutants import KINDS

SAMPLE = 30


@pytest.mark.parametrize(("name", "tp"), [("gpt", 2), ("llama", 3), ("bert", 3), ("neox", 2)])
def test_whatever_is_proved_is_right(name: str, tp: int) -> None:
    it = subject(name, tp)
    assert it.verdict(it.program).proved, str(it.verdict(it.program))
    proved = [m for m in it.mutants() if it.verdict(m.program).proved]
    wrong = [f"{m.kind} at {m.place}" for m in proved if it.differs(m.program)]
    assert wrong == []


def test_most_mutants_differ_and_are_refused() -> None:
    it = subject("llama", 4)
    every = list(it.mutants())
    sample = random.Random(0).sample(every, SAMPLE)
    fates = Counter((it.differs(m.program), it.verdict(m.program).proved) for m in sample)
    assert fates[True, True] == 0
    assert fates[True, False] > 0.8 * SAMPLE
    assert len({m.kind for m in every}) >= len(KINDS) - 2


def test_a_refusal_says_where_what_and_what_for() -> None:
    it = subject("gpt", 2)
    mutant = next(m for m in it.mutants() if m.kind == "drop" and "all_reduce" in m.place)
    verdict = it.verdict(mutant.program)
    assert not verdict.proved
    assert verdict.module.startswith("blocks.") or verdict.module in ("wte", "")
    assert verdict.source.rpartition("/")[2].startswith("models.py:")
    assert "a partial sum" in verdict.found
    assert verdict.effect
    assert str(verdict).startswith("NOT PROVED: ")
