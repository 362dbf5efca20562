"""Whatever the plan, the result is right: random layouts of the weights, odd and contradictory ones too.

``decide`` would never give these layouts; a person may, in a plan. Each rule must then either follow
them or ask for whole values, and never compute something else.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import pytest
from torch import nn

from passes import IndexSet, Layout, Shards
from tests.passes.harness import check, randn
from tests.passes.test_rules import OPAQUE, POINTWISE, REDUCTIONS, VIEWS, Between

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


def some_plan(model: nn.Module, tp: int, rng: random.Random) -> Mapping[str, Layout]:
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
    model = Between(OPS[name], 60)
    for seed in range(4):
        rng = random.Random(f"{name} {seed}")
        check(model, randn(2, 3, 64), tps=(2 + seed % 3,), stored=lambda tp: some_plan(model, tp, rng))
