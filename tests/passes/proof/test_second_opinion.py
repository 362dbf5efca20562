"""What the proof says of a program's collectives, whole or with one gone wrong, a type checker not ours says too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import spmd_types
import torch
from torch import nn

from autotp.program.sharded_program import ShardedProgram, shard_graph
from passes import ops
from passes.layouts.sharded_value import PerRank
from tests.mutation import judge, mutants
from tests.mutation.judge import Subject
from tests.mutation.mutants import Mutant
from tests.passes.harness import called, captured_of, randn, scrambled
from tests.passes.proof.second_opinion import RULES, refusal
from tests.passes.rules.test_forms import HIDDEN, FusedNorms, KeyReturned, NormedOverAll

FORMS: dict[str, Callable[[], nn.Module]] = {
    "norm in pieces": NormedOverAll,
    "rms norms": lambda: FusedNorms(nn.RMSNorm),
    "layer norms": lambda: FusedNorms(nn.LayerNorm),
    "key returned": KeyReturned,
}
# gpt: fused qkv, tied vocabulary; neox: one sum for two terms; encoder: an input without gradient enters; llama and
# the norms: two key-value heads, with even replicas on 4 ranks and uneven ones on 3.
SUBJECTS = [("gpt", 2), ("gpt2", 2), ("neox", 3), ("bert", 3), ("encoder", 3), ("llama", 4),
            ("norm in pieces", 3), ("rms norms", 3), ("layer norms", 4)]  # fmt: skip
THOROUGHLY = [("gpt", 2), ("encoder", 3), ("norm in pieces", 4), ("rms norms", 3)]


@functools.cache
def subject(name: str, tp: int) -> Subject:
    """A model and its proved program."""
    if name not in FORMS:
        return judge.subject(name, tp)
    model, x = scrambled(FORMS[name]()), randn(2, 5, HIDDEN)
    captured = captured_of(model, x)
    return Subject(model, {"x": x}, captured, shard_graph(captured, tp))


def opinions(it: Subject, program: ShardedProgram) -> tuple[bool, bool]:
    """Whether a program is proved, and whether it has types."""
    return it.verdict(program).proved, refusal(it.model, program, it.inputs) is None


def agreed(it: Subject, broken: Iterator[Mutant]) -> int:
    """How many of some mutants both refuse; of none of them may they think differently."""
    found = {f"{m.kind} at {m.place}": opinions(it, m.program) for m in broken}
    assert {name: each for name, each in found.items() if each[0] != each[1]} == {}
    return sum(each == (False, False) for each in found.values())


@pytest.mark.parametrize(("name", "tp"), SUBJECTS)
def test_what_is_proved_has_types(name: str, tp: int) -> None:
    it = subject(name, tp)
    assert it.verdict(it.program).proved
    assert refusal(it.model, it.program, it.inputs) is None


@pytest.mark.parametrize(("name", "tp"), SUBJECTS)
def test_collectives_left_out_or_doubled_have_none(name: str, tp: int) -> None:
    it = subject(name, tp)
    there = [n for n in it.program.graph.nodes if n.target in (ops.all_reduce, ops.all_gather, ops.enter)]
    twice = [n for n in there if n.target is not ops.all_gather and not isinstance(n.args[0], tuple)]
    idle = name == "encoder"  # its input enters; no gradient comes to that, so both let it go, or be done twice
    assert agreed(it, mutants.dropped(it.program)) == len(there) - idle
    assert agreed(it, mutants.doubled(it.program)) == len(twice) - idle


@pytest.mark.parametrize(("name", "tp"), THOROUGHLY)
@pytest.mark.parametrize("kind", [mutants.moved, mutants.retyped, mutants.regrouped, mutants.biased_early])
def test_collectives_out_of_place_have_none(
    kind: Callable[[ShardedProgram], Iterator[Mutant]], name: str, tp: int
) -> None:
    it = subject(name, tp)
    assert agreed(it, kind(it.program)) > 0


def test_norms_over_shards_and_uneven_replicas_are_among_them() -> None:
    graph = subject("rms norms", 3).program.graph
    assert called(graph, ["norm_over_shards"]) == {"norm_over_shards": 2}
    assert {n.args[1] for n in graph.nodes if n.target is ops.enter} == {"tp", "tp:0,1|2"}


def test_a_sum_that_counts_each_replica_has_none() -> None:
    it = subject("norm in pieces", 4)
    (once,) = (n for n in it.program.graph.nodes if PerRank((1, 0, 1, 0)) in n.args)
    (broken,) = (m for m in mutants.levelled(it.program) if m.place.startswith(f"{once.name} "))
    assert opinions(it, broken.program) == (False, False)


@pytest.mark.parametrize("kind", [mutants.shards_shifted, mutants.levelled])
def test_only_the_proof_sees_which_indices_a_rank_holds(kind: Callable[[ShardedProgram], Iterator[Mutant]]) -> None:
    it = subject("gpt", 2)
    assert {opinions(it, m.program) for m in kind(it.program)} == {(False, True)}


def test_only_the_proof_sees_overlapping_shards_that_do_not_enter() -> None:
    it = subject("key returned", 2)
    assert opinions(it, it.program) == (True, True)
    found = {m.place: opinions(it, m.program) for m in mutants.dropped(it.program)}
    there = [n for n in it.program.graph.nodes if n.target in mutants.COLLECTIVES]
    assert found == {n.name: (False, n.target is ops.enter_overlapping) for n in there}
    expected = {"enter_overlapping": 2, "broadcast_from_first": 1}
    assert called(it.program.graph, list(expected)) == expected
    assert agreed(it, mutants.doubled(it.program)) == 3


def test_a_refusal_says_where_and_why() -> None:
    it = subject("gpt", 2)
    mutant = next(m for m in mutants.dropped(it.program) if "all_reduce" in m.place)
    said = refusal(it.model, mutant.program, it.inputs)
    assert said is not None
    assert "Partial" in said
    assert "While executing %" in said


def test_nothing_is_left_behind() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    it = subject("gpt", 2)
    refusal(it.model, it.program, it.inputs)
    assert torch.autograd.Function.__dict__["apply"] is before
    assert not spmd_types.is_type_checking()
    assert not any(hasattr(function, "spmd_typecheck") for function in RULES)
    assert not any(spmd_types.has_local_type(p) for p in it.model.parameters())
