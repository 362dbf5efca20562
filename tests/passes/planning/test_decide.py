"""The owners of units."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from passes.planning.decide import _owners


@given(st.integers(1, 6), st.integers(1, 6), st.integers(2, 8), st.booleans())
def test_owners_respect_groups(groups: int, each: int, tp: int, tiled: bool) -> None:
    count = groups * each
    if count < tp:
        return
    group = [i % groups if tiled else i // each for i in range(count)]
    owners = _owners(np.arange(count), group, tp)
    assert sorted(set(owners.tolist())) == list(range(tp)), "every rank gets something"
    together = [{int(o) for o, g in zip(owners, group) if g == wanted} for wanted in range(groups)]
    if groups >= tp and each > 1 and groups > 1:
        assert all(len(t) == 1 for t in together), "whole groups"
    elif 1 < groups < tp:
        assert sum(len(t) for t in together) == tp, "a rank serves one group"
    else:
        assert max(np.bincount(owners)) - min(np.bincount(owners)) <= 1
