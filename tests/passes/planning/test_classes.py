"""Dealing units to ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from passes.planning.classes import deal


@given(st.integers(0, 50), st.integers(1, 9))
def test_deal_is_even(count: int, ranks: int) -> None:
    dealt = deal(count, ranks)
    assert sum(dealt) == count
    assert len(dealt) == ranks
    assert dealt == sorted(dealt, reverse=True)
    assert max(dealt) - min(dealt) <= 1
