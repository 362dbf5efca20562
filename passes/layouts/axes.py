"""axes: the factors that a value's dims are made of.

A view moves no data, it only regroups factors: ``(B, S, H*D) -> (B, S, H, D)`` splits one
factor, ``(B, H, S, D) -> (B*H, S, D)`` groups two. So each dim of a value is a tuple of
:class:`Size` factors, outermost first; a dim of size one is the empty tuple. A factor, counted
over all the dims of a value, is a *virtual dim*. Labels and layouts are stated on virtual dims, so
one dim may contain both a symbolic batch and split heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch

__all__ = ["Axes", "Size", "common_refinement", "shape_of", "size_of", "trivial_axes", "view_axes"]


@dataclass(frozen=True)
class Size:
    """A positive size: an integer times a product of symbols (any other expression is one symbol)."""

    number: int
    symbols: tuple[str, ...] = ()

    @property
    def static(self) -> bool:
        """Whether the size is a known integer."""
        return not self.symbols

    @property
    def is_one(self) -> bool:
        """Whether the size is 1."""
        return self.number == 1 and not self.symbols

    def __mul__(self, other: Size) -> Size:
        return Size(self.number * other.number, tuple(sorted(self.symbols + other.symbols)))

    def over(self, other: Size) -> Size | None:
        """This size divided by ``other``; None if the quotient is not a size."""
        if other.number == 0 or self.number % other.number:
            return None
        rest = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in rest:
                return None
            rest.remove(symbol)
        return Size(self.number // other.number, tuple(rest))

    def __str__(self) -> str:
        return "*".join([str(self.number)] * (self.number != 1 or self.static) + list(self.symbols))


Dim = tuple[Size, ...]
Axes = tuple[Dim, ...]


@lru_cache(maxsize=4096)
def _size_of_expression(expression: sympy.Expr) -> Size:
    if expression.is_Integer:
        return Size(int(expression))
    number, symbols = 1, []
    for factor in sympy.Mul.make_args(expression):
        base, power = factor.as_base_exp()
        if factor.is_Integer:
            number *= int(factor)
        elif base.is_Symbol and power.is_Integer and power > 0:
            symbols += [str(base)] * int(power)
        else:
            return Size(1, (str(expression),))
    if number <= 0:
        return Size(1, (str(expression),))
    return Size(number, tuple(sorted(symbols)))


_KNOWN: WeakKeyDictionary[Any, dict[sympy.Expr, Size]] = WeakKeyDictionary()
"""The sizes of expressions, by torch's shape environment, which a finished capture does not change."""


def _guarded_sizes(environment: Any) -> dict[sympy.Expr, Size]:
    """The expressions that a capture's guards equate to an integer, also once these integers are put in."""
    equal = [g.expr.args for g in environment.guards if isinstance(g.expr, sympy.Eq)]
    equal = [(left, right) for left, right in equal if right.is_Integer and right > 0]
    known: dict[sympy.Expr, sympy.Expr] = {}
    while True:  # blocks // n = 512 and n = 1: then blocks = 512
        new = {left.xreplace({e: n for e, n in known.items() if e != left}): right for left, right in equal}
        new = {left: right for left, right in new.items() if not left.is_number and left not in known}
        if not new:
            return {e: Size(int(n)) for e, n in known.items()}
        known |= new


def size_of(size: int | torch.SymInt) -> Size:
    """The :class:`Size` of one entry of a shape."""
    if not isinstance(size, torch.SymInt):
        return Size(int(size))
    expression, environment = size.node.expr, size.node.shape_env
    result = _size_of_expression(expression)
    if all(x.isidentifier() for x in result.symbols):
        return result
    if environment not in _KNOWN:
        _KNOWN[environment] = _guarded_sizes(environment)
    known = _KNOWN[environment]
    if expression not in known:  # such as max(1, s) where s is at least two, or n + 1 where n is known
        integers = {e: sympy.Integer(n.number) for e, n in known.items() if n.static}
        result = _size_of_expression(expression.xreplace(integers))
        bounds = environment.bound_sympy(expression)
        known[expression] = Size(int(bounds.lower)) if bounds.lower == bounds.upper else result
    return known[expression]


def shape_of(value: Any) -> tuple[Size, ...]:
    """The sizes of a (fake) tensor's dims."""
    return tuple(size_of(s) for s in value.shape)


def trivial_axes(shape: Sequence[Size]) -> Axes:
    """The axes in which every dim is one factor."""
    return tuple(() if s.is_one else (s,) for s in shape)


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes."""
    sizes = list(sizes)
    return Size(math.prod(s.number for s in sizes), tuple(sorted(x for s in sizes for x in s.symbols)))


def common_refinement(first: Dim, second: Dim) -> Dim | None:
    """The coarsest factors into which both dims' factors split; None if there are none.

    >>> four, three, twelve = Size(4), Size(3), Size(12)
    >>> common_refinement((twelve,), (four, three)) == (four, three)
    True
    """
    a, b, out = list(first), list(second), []
    while a and b:
        x, y = a.pop(0), b.pop(0)
        if x == y:
            out.append(x)
        elif (rest := x.over(y)) is not None:
            out.append(y)
            a.insert(0, rest)
        elif (rest := y.over(x)) is not None:
            out.append(x)
            b.insert(0, rest)
        else:
            return None
    return None if a or b else tuple(out)


def view_axes(axes: Axes, shape: Sequence[Size]) -> tuple[Axes, Axes] | None:
    """Follow a view: refine the axes of its input and group them into the output's dims.

    Args:
        axes: the input's axes.
        shape: the output's sizes.

    Returns:
        The refined input axes (same dims, factors split where the view splits them) and the output axes
        (the same factors in order); None if the view cuts across factors.
    """
    factors = [(dim, size) for dim, sizes in enumerate(axes) for size in sizes]
    refined: list[list[Size]] = [[] for _ in axes]
    out: list[Dim] = []
    for target in shape:
        group: list[Size] = []
        while not target.is_one:
            if not factors:
                return None
            dim, size = factors.pop(0)
            if (rest := target.over(size)) is not None:
                factor, target = size, rest
            elif (rest := size.over(target)) is not None:
                factor, target = target, Size(1)
                factors.insert(0, (dim, rest))
            else:
                return None
            group.append(factor)
            refined[dim].append(factor)
        out.append(tuple(group))
    if factors:
        return None
    return tuple(tuple(r) for r in refined), tuple(out)
