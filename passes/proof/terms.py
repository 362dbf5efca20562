"""Terms: the expressions of the dense model that values stand for, in a normal form.

A term is a sum of atoms with coefficients; an atom is an op on terms. Sums and multiples by numbers are
taken apart (so that a bias may be added before or after a residual), a mean is a sum over a number of
elements, a product is an einsum whoever spells it, and a view is of what was viewed first. Terms that are
equal in this form have the same number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from passes.layouts.axes import Size

__all__ = ["Coefficient", "Terms", "canonical", "plain", "spelled", "with_dims"]


@dataclass(frozen=True)
class Coefficient:
    """A rational number times sizes to integer powers."""

    number: Fraction
    sizes: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of(value: Any) -> Coefficient | None:
        """The coefficient that a number or a size is; None for others (infinities)."""
        if isinstance(value, Size):
            powers: dict[str, int] = defaultdict(int)
            for symbol in value.symbols:
                powers[symbol] += 1
            return Coefficient(Fraction(value.number), tuple(sorted(powers.items())))
        try:
            return Coefficient(Fraction(value)) if isinstance(value, (int, float)) else None
        except (OverflowError, ValueError):
            return None

    def __mul__(self, other: Coefficient) -> Coefficient:
        powers: dict[str, int] = defaultdict(int)
        for name, power in self.sizes + other.sizes:
            powers[name] += power
        return Coefficient(self.number * other.number, tuple(sorted((n, p) for n, p in powers.items() if p)))

    def inverse(self) -> Coefficient | None:
        """One over it."""
        if not self.number:
            return None
        return Coefficient(1 / self.number, tuple((n, -p) for n, p in self.sizes))


ONE = Coefficient(Fraction(1))
Parts = Mapping[tuple[int, tuple[tuple[str, int], ...]], Fraction]
"""A sum: how often each atom counts, by atom and by the sizes that multiply it."""


@dataclass
class Terms:
    """All terms, by number.

    Attributes:
        shapes: per term, its (global) sizes.
        views: per term, the shapes in which the dense model views it.
        placed: per kind of op and operand, the placed versions (parts, expands) that the dense model makes of it.
        grads: per term, whether gradients flow through it.
        draws: per way to draw random numbers, the terms that the dense model draws so, in order.
        regions: the graphs of functions that the graph calls, by name.
        sizes: the sizes that the dense model computes, by op and arguments.
    """

    shapes: list[tuple[Size, ...]] = field(default_factory=list)
    views: dict[int, list[tuple[Size, ...]]] = field(default_factory=lambda: defaultdict(list))
    placed: dict[tuple[str, int], dict[Hashable, int]] = field(default_factory=lambda: defaultdict(dict))
    grads: list[bool] = field(default_factory=list)
    draws: dict[Hashable, list[int]] = field(default_factory=lambda: defaultdict(list))
    regions: dict[str, fx.Graph | None] = field(default_factory=dict)
    sizes: dict[Hashable, Size] = field(default_factory=dict)
    _numbers: dict[Hashable, int] = field(default_factory=dict)
    _parts: dict[int, Parts] = field(default_factory=dict)
    _views_of: dict[int, int] = field(default_factory=dict)

    def find(self, key: Hashable) -> int | None:
        """The term of an atom, if there is one."""
        return self._numbers.get(key)

    def atom(self, key: Hashable, shape: Sequence[Size], grad: bool) -> int:
        """The term of an atom."""
        if key not in self._numbers:
            self._numbers[key] = len(self.shapes)
            self.shapes.append(tuple(shape))
            self.grads.append(grad)
        return self._numbers[key]

    def parts(self, term: int) -> Parts:
        """A term as a sum of atoms."""
        return self._parts.get(term, {(term, ()): ONE.number})

    def sum(self, parts: Parts, shape: Sequence[Size]) -> int:
        """The term of a sum of atoms."""
        if len(parts) == 1:
            (((term, sizes), number),) = parts.items()
            if number == 1 and not sizes:
                return term
        grad = any(self.grads[t] for t, _ in parts)
        term = self.atom(("sum", frozenset(parts.items())), shape, grad)
        self._parts.setdefault(term, dict(parts))
        return term

    def added(self, terms: Sequence[tuple[int, Coefficient]], shape: Sequence[Size]) -> int:
        """The term of a weighted sum of terms."""
        total: dict[tuple[int, tuple[tuple[str, int], ...]], Fraction] = defaultdict(Fraction)
        for term, by in terms:
            for (atom, sizes), number in self.parts(term).items():
                scaled = Coefficient(number, sizes) * by
                total[atom, scaled.sizes] += scaled.number
        return self.sum(total, shape)

    def view(self, term: int, shape: Sequence[Size], known: bool) -> int:
        """The term viewed in another shape; ``known`` if the dense model does so."""
        base = self._views_of.get(term, term)
        if known:
            self.views[base].append(tuple(shape))
        if tuple(shape) == self.shapes[base]:
            return base
        viewed = self.atom(("view", base, tuple(shape)), shape, self.grads[base])
        self._views_of[viewed] = base
        return viewed

    def shapes_of(self, term: int) -> list[tuple[Size, ...]]:
        """The shapes in which the dense model has what a term views."""
        base = self._views_of.get(term, term)
        return [self.shapes[base], *dict.fromkeys(self.views[base])]

    def viewed(self, term: int, shape: Sequence[Size]) -> int:
        """The term in another shape, in passing."""
        return self.view(term, shape, known=False)

    def number(self) -> int:
        """The term of the number one."""
        return self.atom(("one",), (), False)


def plain(value: Any) -> Any:
    """A static size as the integer that it is; anything else as it is."""
    return value.number if isinstance(value, Size) and value.static else value


def canonical(value: Any) -> Hashable:
    """An argument as something to compare: numbers, sizes, dtypes, lists of them."""
    if isinstance(value, (list, tuple)):
        return tuple(canonical(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, canonical(v)) for k, v in value.items()))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value if isinstance(value, Hashable) else repr(value)
    return Size(value) if isinstance(value, int) and value > 0 else value


def with_dims(args: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Arguments with dims counted from the first."""

    def counted(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(counted(v) for v in value)
        return value + rank if isinstance(value, int) and value < 0 else value

    return {k: counted(v) if k in ("dim", "dims") and rank else v for k, v in args.items()}


def spelled(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without those that are as by default."""
    if not isinstance(target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(args)} | dict(kwargs)
    found = {}
    for i, argument in enumerate(target._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        default = argument.default_value
        if not (i and argument.has_default_value() and type(value) is type(default) and value == default):
            found[argument.name] = value
    return found
