"""Sizes, factors and views against integer arithmetic and real reshapes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import sympy
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv

from passes.layouts.axes import Size, _guarded_sizes, common_refinement, product, trivial_axes, view_axes
from passes.layouts.units import Units, Value
from tests.passes.layouts.strategies import sized, sizes

some = st.builds(
    lambda number, symbols: Size(number, tuple(sorted(symbols))),
    st.integers(1, 12), st.lists(st.sampled_from(["a", "b"]), max_size=2),
)  # fmt: skip
numbers = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def value(size: Size) -> int:
    """A size with primes for symbols."""
    return size.number * math.prod({"a": 101, "b": 103}[s] for s in size.symbols)


@given(some, some)
def test_arithmetic(x: Size, y: Size) -> None:
    assert value(x * y) == value(x) * value(y)
    assert (x * y).over(y) == x
    quotient = x.over(y)
    assert (quotient is None) == (value(x) % value(y) != 0)
    if quotient is not None:
        assert quotient * y == x
    assert x.is_one == (value(x) == 1)
    assert product([x, y]) == x * y


def test_guards_say_what_a_size_is_by_way_of_one_another() -> None:
    """Blocks are 512 by a guard on what is left of them in another's number; what no guard says stays open."""
    blocks, count, other = sympy.symbols("blocks count other", positive=True, integer=True)
    guards = [sympy.Eq(FloorDiv(blocks, count), 512, evaluate=False), sympy.Eq(count, 1, evaluate=False)]
    guards += [sympy.Ne(other, 3, evaluate=False)]
    known = _guarded_sizes(SimpleNamespace(guards=[SimpleNamespace(expr=g) for g in guards]))
    assert known[count] == Size(1)
    assert known[blocks] == Size(512)
    assert other not in known


def test_text() -> None:
    assert [str(s) for s in (Size(3), Size(1, ("a",)), Size(2, ("a", "b")), Size(1))] == ["3", "a", "2*a*b", "1"]


@given(sizes, sizes)
def test_common_refinement(a: list[int], b: list[int]) -> None:
    found = common_refinement(sized(a), sized(b))
    bounds = [set(np.cumprod(each).tolist()) for each in (a, b)]
    if found is None:
        return
    assert math.prod(s.number for s in found) == math.prod(a) == math.prod(b)
    cuts = set(np.cumprod([s.number for s in found]).tolist())
    assert cuts == bounds[0] | bounds[1], "every cut of either, and no other"


@given(sizes)
def test_common_refinement_exists_where_one_side_is_whole(a: list[int]) -> None:
    assert common_refinement(sized(a), (Size(math.prod(a)),)) == sized(a)


@given(numbers, st.data())
def test_view_axes_follow_a_real_reshape(shape: list[int], data: st.DataObject) -> None:
    total = math.prod(shape)
    out = [1] * data.draw(st.integers(0, 1))
    while total > 1:
        out.append(data.draw(st.sampled_from([d for d in range(2, total + 1) if total % d == 0])))
        total //= out[-1]
    units = Units()
    before = units.labelled(sized(shape))
    found = view_axes(before.axes, sized(out))
    if found is None:
        return
    refined, axes = found
    assert [math.prod(s.number for s in dim) for dim in refined] == shape
    assert [math.prod(s.number for s in dim) for dim in axes] == out
    assert [s for dim in refined for s in dim] == [s for dim in axes for s in dim], "a view only regroups"
    fine = [s.number for dim in axes for s in dim]
    for factor in before.refined(refined).factors:  # labels land where a reshape of the values puts them
        spread = np.broadcast_to(
            factor.labels.reshape([n if v in factor.dims else 1 for v, n in enumerate(fine)]), fine
        ).reshape(out)
        assert set(spread.reshape(-1)) == set(factor.labels.reshape(-1))
        (origin,) = (f for f in before.factors if set(f.labels.reshape(-1)) == set(factor.labels.reshape(-1)))
        dim = [d for d, n in enumerate(shape) if n != 1][origin.dims[0]]
        real = np.broadcast_to(origin.labels.reshape([n if d == dim else 1 for d, n in enumerate(shape)]), shape)
        assert (spread == real.reshape(out)).all()


def test_views_that_cut_across_factors() -> None:
    assert view_axes(trivial_axes(sized([4, 3])), sized([3, 4])) is None
    assert view_axes(trivial_axes((Size(1, ("s",)), Size(6))), (Size(1, ("s",)), Size(2), Size(3))) is not None
    assert view_axes(trivial_axes((Size(1, ("s",)), Size(6))), (Size(6, ("s",)),)) is not None


@given(sizes)
def test_merged_undoes_refined(parts: list[int]) -> None:
    units = Units()
    total = math.prod(parts)
    before = units.labelled((Size(total), Size(7)))
    fine = before.refined((sized(parts), (Size(7),)))
    assert [f.labels.shape for f in fine.factors] == [tuple(parts), (7,)]
    back = fine.merged(0, units)
    assert back is not None
    assert back.axes == before.axes
    assert all((a.labels == b.labels).all() and a.dims == b.dims for a, b in zip(back.factors, before.factors))


def test_merged_spreads_labels_over_factors_without() -> None:
    units = Units()
    (factor,) = units.labelled(sized([4])).factors
    outer = Value((sized([4, 3]),), (factor,)).merged(0, units)
    assert outer is not None
    assert outer.factors[0].labels.tolist() == [i for i in factor.labels for _ in range(3)]
    assert Value(((Size(1, ("s",)), Size(3)),)).merged(0, units) is None
