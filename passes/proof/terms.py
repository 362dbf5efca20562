"""terms: the expressions of the dense model that values stand for, in a normal form.

A term is a sum of atoms with coefficients; an atom is an op on terms. The normal form:

- sums and multiples by numbers are taken apart, so that a bias may be added before or after a residual;
- a mean is a sum divided by the number of elements;
- a matrix product is an einsum, whichever op computes it;
- a view of a view is a view of the first value.

Terms that are equal in this form have the same number.
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

__all__ = ["Coefficient", "Terms", "canonical", "named_arguments", "static_int", "with_positive_dims"]


@dataclass(frozen=True)
class Coefficient:
    """A rational number times sizes to integer powers."""

    number: Fraction
    sizes: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of(value: Any) -> Coefficient | None:
        """A number or a size as a coefficient; None for other values, infinities among them."""
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
        """The reciprocal; None for zero."""
        if not self.number:
            return None
        return Coefficient(1 / self.number, tuple((n, -p) for n, p in self.sizes))


ONE = Coefficient(Fraction(1))
Sum = Mapping[tuple[int, tuple[tuple[str, int], ...]], Fraction]
"""A sum of atoms: the factor of each, by atom and by the sizes that multiply it."""


@dataclass
class Terms:
    """All terms, by number.

    Attributes:
        shapes: per term, its (global) shape.
        views: per term, the shapes in which the dense model views it.
        variants: per kind of op ("part", "expand", "call", "norm") and operand, the terms that the dense model
            computes from it, by the op's other arguments.
        grads: per term, whether gradients flow through it.
        draws: per random op with its arguments, the terms that the dense model draws by it, in order.
        regions: the graphs of the functions that the graph calls, by name.
        sizes: the sizes that the dense model computes, by op and arguments.
    """

    shapes: list[tuple[Size, ...]] = field(default_factory=list)
    views: dict[int, list[tuple[Size, ...]]] = field(default_factory=lambda: defaultdict(list))
    variants: dict[tuple[str, int], dict[Hashable, int]] = field(default_factory=lambda: defaultdict(dict))
    grads: list[bool] = field(default_factory=list)
    draws: dict[Hashable, list[int]] = field(default_factory=lambda: defaultdict(list))
    regions: dict[str, fx.Graph | None] = field(default_factory=dict)
    sizes: dict[Hashable, Size] = field(default_factory=dict)
    _numbers: dict[Hashable, int] = field(default_factory=dict)
    _sums: dict[int, Sum] = field(default_factory=dict)
    _views_of: dict[int, int] = field(default_factory=dict)

    def find(self, key: Hashable) -> int | None:
        """The term of the atom with this key; None if there is none."""
        return self._numbers.get(key)

    def atom(self, key: Hashable, shape: Sequence[Size], grad: bool) -> int:
        """The term of the atom with this key, which is made if there is none yet."""
        if key not in self._numbers:
            self._numbers[key] = len(self.shapes)
            self.shapes.append(tuple(shape))
            self.grads.append(grad)
        return self._numbers[key]

    def atoms(self, term: int) -> Sum:
        """A term as a sum of atoms."""
        return self._sums.get(term, {(term, ()): ONE.number})

    def sum(self, atoms: Sum, shape: Sequence[Size]) -> int:
        """The term of a sum of atoms."""
        if len(atoms) == 1:
            (((term, sizes), number),) = atoms.items()
            if number == 1 and not sizes:
                return term
        grad = any(self.grads[t] for t, _ in atoms)
        term = self.atom(("sum", frozenset(atoms.items())), shape, grad)
        self._sums.setdefault(term, dict(atoms))
        return term

    def weighted_sum(self, terms: Sequence[tuple[int, Coefficient]], shape: Sequence[Size]) -> int:
        """The term of a weighted sum of terms."""
        total: dict[tuple[int, tuple[tuple[str, int], ...]], Fraction] = defaultdict(Fraction)
        for term, factor in terms:
            for (atom, sizes), number in self.atoms(term).items():
                scaled = Coefficient(number, sizes) * factor
                total[atom, scaled.sizes] += scaled.number
        return self.sum(total, shape)

    def view(self, term: int, shape: Sequence[Size], known: bool) -> int:
        """The view of a term in another shape; ``known``: the dense model has this view."""
        base = self._views_of.get(term, term)
        if known:
            self.views[base].append(tuple(shape))
        if tuple(shape) == self.shapes[base]:
            return base
        viewed = self.atom(("view", base, tuple(shape)), shape, self.grads[base])
        self._views_of[viewed] = base
        return viewed

    def shapes_of(self, term: int) -> list[tuple[Size, ...]]:
        """The shapes in which the dense model has the value that a term is a view of."""
        base = self._views_of.get(term, term)
        return [self.shapes[base], *dict.fromkeys(self.views[base])]

    def passing_view(self, term: int, shape: Sequence[Size]) -> int:
        """The view of a term in a shape that the dense model need not have."""
        return self.view(term, shape, known=False)

    def number(self) -> int:
        """The term of the number one."""
        return self.atom(("one",), (), False)


def static_int(value: Any) -> Any:
    """A static size as an integer; another value unchanged."""
    return value.number if isinstance(value, Size) and value.static else value


def canonical(value: Any) -> Hashable:
    """A hashable form of an argument: a number, a size, a dtype, or a list or dict of them."""
    if isinstance(value, (list, tuple)):
        return tuple(canonical(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, canonical(v)) for k, v in value.items()))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value if isinstance(value, Hashable) else repr(value)
    return Size(value) if isinstance(value, int) and value > 0 else value


def with_positive_dims(args: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The arguments, with negative dims counted from the first one."""

    def positive(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(positive(v) for v in value)
        return value + rank if isinstance(value, int) and value < 0 else value

    return {k: positive(v) if k in ("dim", "dims") and rank else v for k, v in args.items()}


def named_arguments(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without those that equal their default."""
    if not isinstance(target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(args)} | dict(kwargs)
    named = {}
    for i, argument in enumerate(target._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        default = argument.default_value
        if not (i and argument.has_default_value() and type(value) is type(default) and value == default):
            named[argument.name] = value
    return named
