"""causal: masks that say no more than that no query sees later keys, or that mask nothing, are not made.

Models build a causal mask out of ``arange`` and comparisons, and then attention reads it from memory. What such a
mask says is worked out here from how it is made: an integer value as an expression of its indices and of sizes, a
boolean one as inequalities. ``is_causal`` is a kernel that skips what is masked and reads nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import Size, cut, is_tensor, local, remove_dead_code

__all__ = ["causal"]

aten = torch.ops.aten


@functools.lru_cache(maxsize=512)
def _symbol(text: str) -> sympy.Expr:
    return sympy.sympify(text, locals={}) if not text.isidentifier() else sympy.Symbol(text)


def _number(size: Size) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else _symbol(size)


@functools.lru_cache(maxsize=64)
def _index(dim: int) -> sympy.Symbol:
    return sympy.Symbol(f"index{dim}")


class _Holds(frozenset[sympy.Expr]):
    """A condition: all of these are 0 or less. Nothing in it: it always holds."""


class _Reader:
    """What integer and boolean values are, as expressions of their indices; those it cannot tell are left out."""

    def __init__(self) -> None:
        self.values: dict[fx.Node, sympy.Expr | _Holds] = {}

    def read(self, node: fx.Node) -> None:
        """Note what a node is."""
        if node.op != "call_function":
            return
        rule = _RULES.get(op_name(node))
        if rule is None:
            return
        try:
            found = rule(self, node)
        except (KeyError, TypeError, ValueError, AttributeError, NotImplementedError):
            return  # an argument that it cannot tell
        if found is not None:
            self.values[node] = found

    def of(self, x: Any, rank: int | None = None) -> sympy.Expr:
        """An integer argument, on its own dims or on those of a result of so many."""
        if isinstance(x, (bool, float)):
            return sympy.Integer(int(x)) if int(x) == x else _never()
        if isinstance(x, int):
            return sympy.Integer(x)
        found = self.values[x]
        if isinstance(found, _Holds):
            raise ValueError("a condition where a number was expected")
        return self.shifted(found, rank - _rank(x)) if is_tensor(x) and rank is not None else found

    def condition(self, x: fx.Node, rank: int) -> _Holds:
        """A boolean argument, on the dims of a result of so many."""
        found = self.values[x]
        if not isinstance(found, _Holds):
            raise ValueError("a number where a condition was expected")
        by = rank - _rank(x)
        return _Holds(self.shifted(e, by) for e in found)

    def shifted(self, expression: sympy.Expr, by: int, start: int = 0) -> sympy.Expr:
        """An expression whose indices from ``start`` on are those of dims ``by`` further on."""
        if not by:
            return expression
        moved = {_index(d): _index(d + by) for d in range(start, 16)}
        return expression.xreplace(moved)


def _never() -> sympy.Expr:
    raise ValueError("no integer")


def _rank(node: fx.Node) -> int:
    return len(local(node).shape)


def _arange(reader: _Reader, node: fx.Node) -> sympy.Expr:
    numbers = [reader.of(a) for a in node.args]
    if len(numbers) == 3 and numbers[2] != 1:
        raise ValueError("a step")
    return (numbers[0] if len(numbers) > 1 else sympy.Integer(0)) + _index(0)


def _filled(reader: _Reader, node: fx.Node) -> sympy.Expr | _Holds:
    value: Any = {"aten.ones": 1, "aten.zeros": 0}.get(op_name(node))
    value = node.args[1] if value is None else value
    if local(node).dtype is torch.bool:
        return _Holds() if value else _Holds({sympy.Integer(1)})
    return reader.of(value)


def _size(reader: _Reader, node: fx.Node) -> sympy.Expr:
    source, dim = node.args
    return _number(local(source).shape[dim])


def _unsqueezed(reader: _Reader, node: fx.Node) -> Any:
    source, dim = node.args
    dim %= _rank(node)
    return _each(reader.values[source], lambda e: reader.shifted(e, 1, dim))


def _each(value: sympy.Expr | _Holds, change: Callable[[sympy.Expr], sympy.Expr]) -> Any:
    return _Holds(map(change, value)) if isinstance(value, _Holds) else change(value)


def _expanded(reader: _Reader, node: fx.Node) -> Any:
    source = node.args[0]
    return _each(reader.values[source], lambda e: reader.shifted(e, _rank(node) - _rank(source)))


def _sliced(reader: _Reader, node: fx.Node) -> Any:
    source, dim, start, _, step = cut(node)
    if step != 1 or (isinstance(start, int) and start < 0):
        raise ValueError("a step, or a start from behind")
    by = reader.of(start)
    at = _index(dim)
    keep = 0 if local(node).shape[dim] == 1 else at  # the only index of a dim of one is 0
    return _each(reader.values[source], lambda e: e.xreplace({at: keep + by}))


def _same(reader: _Reader, node: fx.Node) -> Any:
    source = node.args[0]
    if (local(source).dtype is torch.bool) is not (local(node).dtype is torch.bool):
        value = reader.values[source]
        if value != _Holds({sympy.Integer(1)}):
            raise ValueError("a truth value as a number")
        return sympy.Integer(0)
    return reader.values[source]


def _sum(sign: int) -> Callable[[_Reader, fx.Node], sympy.Expr]:
    def rule(reader: _Reader, node: fx.Node) -> sympy.Expr:
        if node.kwargs or local(node).dtype.is_floating_point:
            raise ValueError("a scaled sum, or one of fractions")
        left, right = (reader.of(a, _rank(node)) for a in node.args)
        return left + sign * right

    return rule


def _size_sum(sign: int) -> Callable[[_Reader, fx.Node], sympy.Expr]:
    return lambda reader, node: reader.of(node.args[0]) + sign * reader.of(node.args[1])


def _compared(more: Callable[[sympy.Expr, sympy.Expr], Sequence[sympy.Expr]]) -> Callable[[_Reader, fx.Node], _Holds]:
    def rule(reader: _Reader, node: fx.Node) -> _Holds:
        left, right = (reader.of(a, _rank(node)) for a in node.args[:2])
        return _Holds(sympy.expand(e) for e in more(left, right))

    return rule


def _unequal(reader: _Reader, node: fx.Node) -> _Holds:
    left, right = (reader.of(a, _rank(node)) for a in node.args[:2])
    difference = sympy.expand(left - right)
    if not difference.is_Integer:
        raise ValueError("not known to differ")
    return _Holds() if difference else _Holds({sympy.Integer(1)})


def _both(reader: _Reader, node: fx.Node) -> _Holds:
    left, right = (reader.condition(a, _rank(node)) for a in node.args)
    return _Holds(left | right)


def _summed(reader: _Reader, node: fx.Node) -> sympy.Expr:
    value = reader.values[node.args[0]]
    if value not in (sympy.Integer(0), _Holds({sympy.Integer(1)})):
        raise ValueError("a sum of more than zeros")
    return sympy.Integer(0)


def _differences(reader: _Reader, node: fx.Node) -> sympy.Expr:
    source, times, dim, before = node.args
    index = _index(dim % _rank(node))
    value, first = reader.of(source), reader.of(before)
    step = sympy.expand(value.xreplace({index: index + 1}) - value)
    if times != 1 or local(before).shape[dim] != 1 or sympy.expand(value.xreplace({index: 0}) - first) != step:
        raise ValueError("differences that are not all the same")
    return step


def _picked(reader: _Reader, node: fx.Node) -> sympy.Expr:
    source, indices = node.args
    if any(i is None for i in indices) or len(indices) != _rank(source):
        raise ValueError("part of the dims")
    at = {_index(d): reader.of(i, _rank(node)) for d, i in enumerate(indices)}
    return reader.of(source).xreplace(at)


_RULES: dict[str, Callable[[_Reader, fx.Node], Any]] = {
    "aten.arange": _arange,
    "aten.ones": _filled,
    "aten.zeros": _filled,
    "aten.full": _filled,
    "aten.sym_size": _size,
    "aten.unsqueeze": _unsqueezed,
    "aten.expand": _expanded,
    "aten.slice": _sliced,
    "aten.to": _same,
    "aten._to_copy": _same,
    "aten.add": _sum(1),
    "aten.sub": _sum(-1),
    "add": _size_sum(1),
    "sub": _size_sum(-1),
    "aten.le": _compared(lambda a, b: [a - b]),
    "aten.lt": _compared(lambda a, b: [a - b + 1]),
    "aten.ge": _compared(lambda a, b: [b - a]),
    "aten.gt": _compared(lambda a, b: [b - a + 1]),
    "aten.eq": _compared(lambda a, b: [a - b, b - a]),
    "aten.ne": _unequal,
    "aten.__and__": _both,
    "aten.bitwise_and": _both,
    "aten.logical_and": _both,
    "aten.cumsum": _summed,
    "aten.diff": _differences,
    "aten.index": _picked,
}


def _always(expression: sympy.Expr, shape: Sequence[Size]) -> bool:
    """Whether an expression is 0 or less for all indices below these sizes, and sizes of one or more."""
    largest = sympy.expand(expression)
    for dim, size in enumerate(shape):
        factor = largest.coeff(_index(dim))
        largest = sympy.expand(largest - factor * _index(dim) + sympy.Max(factor, 0) * (_number(size) - 1))
    sizes = sorted(largest.free_symbols, key=str)
    if any(s.name.startswith("index") for s in sizes):
        return False
    more = sympy.Poly(largest.subs({s: s + 1 for s in sizes}), *sizes) if sizes else None
    return bool(all(c <= 0 for c in more.coeffs()) if more is not None else largest <= 0)


def _said(reader: _Reader, mask: fx.Node) -> _Holds | None:
    """What a mask asks for that is not always so: of booleans, or of zeros and of numbers too low to count."""
    if op_name(mask) == "aten.where":
        chosen, seen, unseen = mask.args
        if not _is_number(seen, lambda n: n == 0) or not _is_number(unseen, lambda n: n <= -1e30):
            return None
        mask = chosen
    found = reader.values.get(mask)
    if not isinstance(found, _Holds):
        return None
    return _Holds(e for e in found if not _always(e, local(mask).shape))


def _is_number(x: Any, fits: Callable[[float], bool]) -> bool:
    while isinstance(x, fx.Node) and op_name(x) in ("aten.expand", "aten.to", "aten.unsqueeze", "aten.scalar_tensor"):
        x = x.args[0]
    if isinstance(x, fx.Node) and op_name(x) == "aten.full":
        x = x.args[1]
    return isinstance(x, (int, float)) and fits(x)


def _causal_on(shape: Sequence[Size]) -> _Holds:
    return _Holds({_index(len(shape) - 1) - _index(len(shape) - 2)})


def causal(graph: fx.Graph) -> int:
    """Give attention ``is_causal`` for a mask that says just that, and no mask for one that masks nothing.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        How many attentions no longer read a mask.
    """
    attentions = [n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    masked = [n for n in attentions if is_tensor(_mask(n))]
    if not masked:
        return 0
    reader = _Reader()
    for node in graph.nodes:
        reader.read(node)
    count = 0
    for node in masked:
        mask = _mask(node)
        said, shape = _said(reader, mask), local(mask).shape
        if said is None or len(shape) < 2:
            continue
        query, key = (local(n).shape for n in node.args[:2])
        if said and (said != _causal_on(shape) or query[-2] != key[-2]):
            continue
        rest = [*node.args[3:], *[None, 0.0, False][len(node.args) - 3 :]][:3]
        dropout, before = node.kwargs.get("dropout_p", rest[1]), node.kwargs.get("is_causal", rest[2])
        if before:
            continue
        node.args = node.args[:3]
        node.kwargs = {
            **{k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")},
            **({"dropout_p": dropout} if dropout else {}),
            **({"is_causal": True} if said else {}),
        }
        count += 1
    remove_dead_code(graph)
    return count


def _mask(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
