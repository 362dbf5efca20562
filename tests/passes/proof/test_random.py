"""What the proof claims of random numbers, in small scope: the ranks' draws are parts of one dense draw."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import fx

from autotp.verification.threads import World, lockstep
from passes import ops
from passes.proof.claims import Claim, Unproved
from passes.proof.dense import read
from passes.proof.rules import follow
from passes.proof.steps import Proof
from tests.passes.proof.small_scope import Operand, claim_of, leaf, lists_of

aten = torch.ops.aten
SHAPE = (2, 5)
WAYS = {"dropped": (aten.dropout.default, (0.5, True)), "drawn": (aten.bernoulli.p, (0.5,))}


def _drawn(rule: str, way: str, tp: int) -> Iterator[tuple[Operand, Claim, list[torch.Tensor], torch.Tensor]]:
    """Each layout of which something is claimed, with every rank's draw."""
    made = leaf(*SHAPE, tp=tp)
    op, rest = WAYS[way]
    dense = fx.Graph()
    x = dense.create_node("get_attr", "x")
    x.meta["val"] = value = made.value.clone().requires_grad_(True)
    result = dense.call_function(op, (x, *rest))
    result.meta["val"] = op(value, *rest)
    result.meta["random"] = True
    dense.output((result,))
    for operand in made.operands:
        terms, meant = read(dense, ["x"])
        proof, graph = Proof(terms, tp), fx.Graph()
        mine = graph.create_node("get_attr", "x")
        proof.values[mine] = claim_of(meant[x], SHAPE, operand)
        node = graph.call_function(getattr(ops, rule), (op, mine, *rest))
        try:
            claim = follow(proof, node)
        except Unproved:
            continue
        held = [made.value[np.ix_(*lists_of(proof.values[mine], r, SHAPE))] for r in range(tp)]

        def work(rank: int, held: list[torch.Tensor] = held) -> torch.Tensor:
            return torch.as_tensor(getattr(ops, rule)(op, held[rank], *rest))

        yield operand, claim, lockstep(tp, World(tp), work), made.value


def _joined(claim: Claim, drawn: list[torch.Tensor]) -> torch.Tensor:
    """The dense draw that the ranks' draws are parts of; fails where two ranks drew otherwise for one element."""
    found = torch.full(SHAPE, torch.nan, dtype=torch.float64)
    for rank, part in enumerate(drawn):
        at = np.ix_(*lists_of(claim, rank, SHAPE))
        known = found[at]
        found[at] = part
        assert torch.all(known.isnan() | (known == part)), "two ranks drew otherwise for one element"
        assert torch.equal(found[at], part), "a rank drew twice for one element"
    return found


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", ["random_same", "random_per_rank"])
def test_draws_that_are_proved_are_parts_of_one(rule: str, way: str, tp: int) -> None:
    count = 0
    for operand, claim, drawn, value in _drawn(rule, way, tp):
        count += 1
        found = _joined(claim, drawn)
        allowed = (0 * value, 2 * value) if way == "dropped" else (0 * value, 0 * value + 1)
        assert torch.all(found.isnan() | (found == allowed[0]) | (found == allowed[1])), operand
    assert 0 < count < len(leaf(*SHAPE, tp=tp).operands), "some are claimed and some are refused"


@pytest.mark.parametrize("rule", ["random_same", "random_per_rank"])
def test_draws_of_parts_that_several_ranks_hold_are_caught(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Proof, "check_draw", lambda proof, step, claim: claim)
    draws = [(claim, drawn) for _, claim, drawn, _ in _drawn(rule, "dropped", 2)]
    with pytest.raises(AssertionError, match="drew"):
        [_joined(*each) for each in draws]
