"""Rules made wrong on purpose, and collectives with wrong backwards: arithmetic in small scope shows each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from passes.ops import collectives as parallel
from passes.proof import claims, collectives, lookups, movement, products, reductions, results
from tests.passes.proof import test_collectives, test_rules
from tests.passes.proof.small_scope import Case, check


def _exactly(dim: Any, places: Any, what: Any) -> Any:
    found = moves_match(dim, places, what)
    return found and (True, found[1])


moves_match, combine = movement._match, results.combine
WRONG: dict[str, tuple[Callable[[int], list[Case]], Any, str, Any]] = {
    "indices that several ranks hold are summed": (test_rules.matrices, products, "is_partition", lambda splits: True),
    "no gradient is asked for": (test_rules.pointwise, results, "_require_entered", lambda flowing, fits: None),
    "operands need not agree": (test_rules.pointwise, results, "common_dim", lambda one, two: one),
    "what is written over may be split": (
        test_rules.writings, lookups, "combine", lambda *args, **_: combine(*args)
    ),
    "a softmax may mix parts": (test_rules.mixings, reductions, "is_unsplit", lambda dim: True),
    "windows may reach over two shards": (test_rules.windows, movement, "is_unsplit", lambda dim: True),
    "a function may ask which head it is at": (
        test_rules.flexible_attentions, products, "_reads_argument", lambda *_: False
    ),
    "queries may meet any keys": (
        test_rules.flexible_attentions, products, "_heads", lambda *_: np.empty(0, dtype=np.int64)
    ),
    "replicas do not count": (test_rules.pointwise, claims, "is_disjoint", lambda splits: True),
    "an element may be taken twice": (test_rules.own_parts, movement, "_match", _exactly),
    "places need not be those held": (test_collectives.gathers, collectives, "_matches_split", lambda *_: True),
    "a gather may leave gaps": (test_collectives.gathers, collectives, "_covers", lambda splits: True),
    "any group will do": (test_collectives.reductions, collectives, "_require_all_ranks", lambda *_: None),
    "what has entered may enter": (
        test_collectives.entries, collectives, "_enter_gradient", lambda c: claims.Claim(c.term, c.dims, "partial")
    ),
    "words need not start there": (test_collectives.embeddings, collectives, "_require_contiguous", lambda *_: None),
    "classes need not start there": (test_collectives.losses, collectives, "_require_contiguous", lambda *_: None),
    "a reduction's backward reduces too": (
        test_collectives.reductions, parallel._AllReduce, "backward", staticmethod(lambda ctx, g: (2 * g, None))
    ),
    "an entry's backward does nothing": (
        test_collectives.entries, parallel._Enter, "backward", staticmethod(lambda ctx, *g: (None, *g))
    ),
    "a gather's backward takes all replicas": (
        test_collectives.gathers, parallel._AllGather, "backward",
        staticmethod(lambda ctx, g: (parallel._take(g, ctx.places, ctx.group.rank), None, None)),
    ),
    "every rank settles": (
        test_collectives.settlements, parallel._BroadcastFromFirst, "backward", staticmethod(lambda ctx, g: (g, None))
    ),
    "overlaps are not summed": (
        test_collectives.overlaps, parallel._EnterOverlapping, "backward", staticmethod(lambda ctx, g: (g, None, None))
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_rule_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, where, name, instead = WRONG[fault]
    monkeypatch.setattr(where, name, instead)
    with torch.autograd.set_multithreading_enabled(False):
        assert any(check(case, stop=1).wrong for case in cases(2))
