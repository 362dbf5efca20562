"""Terms of the proof: sums that differ are not taken for one another."""

from __future__ import annotations

from passes.layouts.axes import Size
from passes.proof.terms import ONE, Coefficient, Terms


def test_multiples_by_sizes_are_counted() -> None:
    terms, shape = Terms(), (Size(4),)
    x, tokens = terms.atom(("input", 0), shape, True), Coefficient.of(Size(1, ("s0",)))
    assert tokens is not None
    once, twice = (terms.weighted_sum([(x, ONE), *[(x, tokens)] * n], shape) for n in (1, 2))
    assert once != twice
    assert twice == terms.weighted_sum([(once, ONE), (x, tokens)], shape)
    assert terms.weighted_sum([(once, ONE), (x, tokens * (Coefficient.of(-1) or ONE))], shape) != twice


def test_sums_are_the_same_in_any_order() -> None:
    terms, shape = Terms(), (Size(4),)
    a, b, c = (terms.atom(("input", i), shape, True) for i in range(3))
    left = terms.weighted_sum([(terms.weighted_sum([(a, ONE), (b, ONE)], shape), ONE), (c, ONE)], shape)
    assert left == terms.weighted_sum([(c, ONE), (terms.weighted_sum([(b, ONE), (a, ONE)], shape), ONE)], shape)
    assert left != terms.weighted_sum([(a, ONE), (b, ONE)], shape)
