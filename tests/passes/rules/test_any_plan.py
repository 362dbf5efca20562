"""Whatever the plan, the result is right: random layouts of the weights, odd and contradictory ones too.

``decide`` would never give these layouts; a person may, in a plan. Each rule must then either follow
them or ask for whole values, and never compute something else.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
from torch import nn

from passes import IndexSet, Layout, Shards
from tests.passes.harness import check, randn
from tests.passes.rules.test_rules import OPAQUE, POINTWISE, REDUCTIONS, VIEWS, Attention, Language, between, ids

OPS = {**VIEWS, **POINTWISE, **REDUCTIONS, **OPAQUE}


def some_shards(size: int, tp: int, rng: random.Random) -> Shards | None:
    """Index sets that cover ``size``: even, uneven, scattered or overlapping ones."""
    if size < tp:
        return None
    kind = rng.choice(["blocks", "scattered", "overlapping", "replicas"])
    owner = np.sort(np.concatenate([np.arange(tp), np.array([rng.randrange(tp) for _ in range(size - tp)], dtype=int)]))
    if kind == "scattered":
        owner = np.array(rng.sample(owner.tolist(), size))
    if kind == "replicas":
        owner = owner // 2 * 2
        return Shards(size, tuple(IndexSet.of(np.flatnonzero(owner == r // 2 * 2)) for r in range(tp)))
    held = [set(np.flatnonzero(owner == r).tolist()) for r in range(tp)]
    if kind == "overlapping":
        held = [s | set(rng.sample(range(size), size // 4)) for s in held]
    return Shards(size, tuple(IndexSet.of(sorted(s)) for s in held))


def some_plan(model: nn.Module, rng: random.Random, tp: int) -> Mapping[str, Layout]:
    """Each parameter whole, or split along one dim by random sets, some of them the same sets."""
    known: dict[int, Shards] = {}
    plan = {}
    for name, p in model.named_parameters():
        dim = rng.randrange(-1, p.dim())
        if dim < 0:
            continue
        size = p.shape[dim]
        shards = known.get(size) if rng.random() < 0.6 else None
        shards = shards or some_shards(size, tp, rng)
        if shards is not None:
            known[size] = shards
            virtual = sum(n > 1 for n in p.shape[:dim])
            plan[name] = Layout.of({virtual: shards})
    return plan


@pytest.mark.parametrize("name", OPS)
def test_any_plan(name: str) -> None:
    model = between(OPS[name])
    check(model, randn(2, 3, 64), tps=(3, 4), weight_layouts=partial(some_plan, model, random.Random(name)))


@pytest.mark.parametrize("by", ["gqa", "expand", "hand"])
def test_any_plan_of_attention(by: str) -> None:
    model = Attention(8, 8 if by == "hand" else 2, 12, by=by, norm=True)
    check(model, randn(2, 3, 64), tps=(2, 3, 4) * 2, weight_layouts=partial(some_plan, model, random.Random(by)))


@pytest.mark.parametrize("tied", [False, True])
def test_any_plan_of_a_vocabulary(tied: bool) -> None:
    model = Language(61, tied=tied)
    check(
        model, ids(61), ids(61, -100), tps=(2, 3, 4) * 2, weight_layouts=partial(some_plan, model, random.Random(tied))
    )


def test_heads_of_which_only_some_weights_are_split() -> None:
    """Key-value heads must then be fetched for, or dealt to, the heads that they serve."""
    model = Attention(8, 2, 12)
    (program,) = check(model, randn(2, 3, 64), tps=(4,))
    for parts in ("qo", "q", "qko", "kv"):
        weight_layouts = {name: layout for name, layout in program.weight_layouts.items() if name[0] in parts}
        check(model, randn(2, 3, 64), tps=(4,), weight_layouts=lambda tp, weight_layouts=weight_layouts: weight_layouts)
