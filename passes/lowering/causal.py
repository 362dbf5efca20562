"""causal: give attention ``is_causal`` in place of a causal mask, and no mask in place of one that masks nothing.

Models build a causal mask from ``arange`` and comparisons, and attention reads it from memory. The meaning of such a
mask follows from the ops that compute it: an integer value is an expression of its indices and of sizes, a boolean one
is a set of inequalities. With ``is_causal`` the kernel skips masked keys and reads no mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import Size, is_tensor, local, remove_dead_code, slice_arguments

__all__ = ["causal"]

aten = torch.ops.aten


@functools.lru_cache(maxsize=512)
def _size_symbol(text: str) -> sympy.Expr:
    """A size that differs from call to call, as an expression."""
    return sympy.sympify(text, locals={}) if not text.isidentifier() else sympy.Symbol(text)


def _size_expression(size: Size) -> sympy.Expr:
    """A size as an expression."""
    return sympy.Integer(size) if isinstance(size, int) else _size_symbol(size)


@functools.lru_cache(maxsize=64)
def _index_symbol(dim: int) -> sympy.Symbol:
    """The symbol of a value's index along a dim."""
    return sympy.Symbol(f"index{dim}")


class _Condition(frozenset[sympy.Expr]):
    """A condition: all of its expressions are 0 or less. One without expressions is always true."""


class _Reader:
    """Integer and boolean values as expressions of their indices and as conditions; unknown ones are left out."""

    def __init__(self) -> None:
        self.values: dict[fx.Node, sympy.Expr | _Condition] = {}

    def read(self, node: fx.Node) -> None:
        """Note a node's value, if it is known."""
        if node.op != "call_function":
            return
        rule = _RULES.get(op_name(node))
        if rule is None:
            return
        try:
            value = rule(self, node)
        except (KeyError, TypeError, ValueError, AttributeError, NotImplementedError):
            return  # an argument is not known
        if value is not None:
            self.values[node] = value

    def integer(self, x: Any, rank: int | None = None) -> sympy.Expr:
        """An integer argument as an expression of its own indices, or of those of a result of this rank."""
        if isinstance(x, (bool, float)):
            return sympy.Integer(int(x)) if int(x) == x else _raise_no_integer()
        if isinstance(x, int):
            return sympy.Integer(x)
        value = self.values[x]
        if isinstance(value, _Condition):
            raise ValueError("a condition where a number was expected")
        return self.shift(value, rank - _rank(x)) if is_tensor(x) and rank is not None else value

    def condition(self, x: fx.Node, rank: int) -> _Condition:
        """A boolean argument as a condition on the indices of a result of this rank."""
        value = self.values[x]
        if not isinstance(value, _Condition):
            raise ValueError("a number where a condition was expected")
        by = rank - _rank(x)
        return _Condition(self.shift(e, by) for e in value)

    def shift(self, expression: sympy.Expr, by: int, start: int = 0) -> sympy.Expr:
        """An expression in which the indices of dims from ``start`` on are those of dims ``by`` further on."""
        if not by:
            return expression
        symbols = {_index_symbol(d): _index_symbol(d + by) for d in range(start, 16)}
        return expression.xreplace(symbols)


def _raise_no_integer() -> sympy.Expr:
    raise ValueError("no integer")


def _rank(node: fx.Node) -> int:
    return len(local(node).shape)


def _arange(reader: _Reader, node: fx.Node) -> sympy.Expr:
    numbers = [reader.integer(a) for a in node.args]
    if len(numbers) == 3 and numbers[2] != 1:
        raise ValueError("a step")
    return (numbers[0] if len(numbers) > 1 else sympy.Integer(0)) + _index_symbol(0)


def _fill(reader: _Reader, node: fx.Node) -> sympy.Expr | _Condition:
    value: Any = {"aten.ones": 1, "aten.zeros": 0}.get(op_name(node))
    value = node.args[1] if value is None else value
    if local(node).dtype is torch.bool:
        return _Condition() if value else _Condition({sympy.Integer(1)})
    return reader.integer(value)


def _size(reader: _Reader, node: fx.Node) -> sympy.Expr:
    source, dim = node.args
    return _size_expression(local(source).shape[dim])


def _unsqueeze(reader: _Reader, node: fx.Node) -> Any:
    source, dim = node.args
    dim %= _rank(node)
    return _map_expressions(reader.values[source], lambda e: reader.shift(e, 1, dim))


def _map_expressions(value: sympy.Expr | _Condition, change: Callable[[sympy.Expr], sympy.Expr]) -> Any:
    """An expression, or each one of a condition, changed."""
    return _Condition(map(change, value)) if isinstance(value, _Condition) else change(value)


def _expand(reader: _Reader, node: fx.Node) -> Any:
    source = node.args[0]
    return _map_expressions(reader.values[source], lambda e: reader.shift(e, _rank(node) - _rank(source)))


def _slice(reader: _Reader, node: fx.Node) -> Any:
    source, dim, start, _, step = slice_arguments(node)
    if step != 1 or (isinstance(start, int) and start < 0):
        raise ValueError("a step, or a start from behind")
    by = reader.integer(start)
    index = _index_symbol(dim)
    new_index = 0 if local(node).shape[dim] == 1 else index  # the only index of a dim of size one is 0
    return _map_expressions(reader.values[source], lambda e: e.xreplace({index: new_index + by}))


def _cast(reader: _Reader, node: fx.Node) -> Any:
    source = node.args[0]
    if (local(source).dtype is torch.bool) is not (local(node).dtype is torch.bool):
        value = reader.values[source]
        if value != _Condition({sympy.Integer(1)}):
            raise ValueError("a truth value as a number")
        return sympy.Integer(0)
    return reader.values[source]


def _sum(sign: int) -> Callable[[_Reader, fx.Node], sympy.Expr]:
    def rule(reader: _Reader, node: fx.Node) -> sympy.Expr:
        if node.kwargs or local(node).dtype.is_floating_point:
            raise ValueError("a scaled sum, or one of fractions")
        left, right = (reader.integer(a, _rank(node)) for a in node.args)
        return left + sign * right

    return rule


def _size_sum(sign: int) -> Callable[[_Reader, fx.Node], sympy.Expr]:
    return lambda reader, node: reader.integer(node.args[0]) + sign * reader.integer(node.args[1])


def _compare(
    more: Callable[[sympy.Expr, sympy.Expr], Sequence[sympy.Expr]],
) -> Callable[[_Reader, fx.Node], _Condition]:
    def rule(reader: _Reader, node: fx.Node) -> _Condition:
        left, right = (reader.integer(a, _rank(node)) for a in node.args[:2])
        return _Condition(sympy.expand(e) for e in more(left, right))

    return rule


def _not_equal(reader: _Reader, node: fx.Node) -> _Condition:
    left, right = (reader.integer(a, _rank(node)) for a in node.args[:2])
    difference = sympy.expand(left - right)
    if not difference.is_Integer:
        raise ValueError("not known to differ")
    return _Condition() if difference else _Condition({sympy.Integer(1)})


def _both(reader: _Reader, node: fx.Node) -> _Condition:
    left, right = (reader.condition(a, _rank(node)) for a in node.args)
    return _Condition(left | right)


def _zero_sum(reader: _Reader, node: fx.Node) -> sympy.Expr:
    value = reader.values[node.args[0]]
    if value not in (sympy.Integer(0), _Condition({sympy.Integer(1)})):
        raise ValueError("a sum of more than zeros")
    return sympy.Integer(0)


def _diff(reader: _Reader, node: fx.Node) -> sympy.Expr:
    source, times, dim, before = node.args
    index = _index_symbol(dim % _rank(node))
    value, first = reader.integer(source), reader.integer(before)
    step = sympy.expand(value.xreplace({index: index + 1}) - value)
    if times != 1 or local(before).shape[dim] != 1 or sympy.expand(value.xreplace({index: 0}) - first) != step:
        raise ValueError("differences that are not all the same")
    return step


def _index(reader: _Reader, node: fx.Node) -> sympy.Expr:
    source, indices = node.args
    if any(i is None for i in indices) or len(indices) != _rank(source):
        raise ValueError("part of the dims")
    replacements = {_index_symbol(d): reader.integer(i, _rank(node)) for d, i in enumerate(indices)}
    return reader.integer(source).xreplace(replacements)


_RULES: dict[str, Callable[[_Reader, fx.Node], Any]] = {
    "aten.arange": _arange,
    "aten.ones": _fill,
    "aten.zeros": _fill,
    "aten.full": _fill,
    "aten.sym_size": _size,
    "aten.unsqueeze": _unsqueeze,
    "aten.expand": _expand,
    "aten.slice": _slice,
    "aten.to": _cast,
    "aten._to_copy": _cast,
    "aten.add": _sum(1),
    "aten.sub": _sum(-1),
    "add": _size_sum(1),
    "sub": _size_sum(-1),
    "aten.le": _compare(lambda a, b: [a - b]),
    "aten.lt": _compare(lambda a, b: [a - b + 1]),
    "aten.ge": _compare(lambda a, b: [b - a]),
    "aten.gt": _compare(lambda a, b: [b - a + 1]),
    "aten.eq": _compare(lambda a, b: [a - b, b - a]),
    "aten.ne": _not_equal,
    "aten.__and__": _both,
    "aten.bitwise_and": _both,
    "aten.logical_and": _both,
    "aten.cumsum": _zero_sum,
    "aten.diff": _diff,
    "aten.index": _index,
}


def _always(expression: sympy.Expr, shape: Sequence[Size]) -> bool:
    """Whether an expression is 0 or less for all indices below these sizes, where all sizes are at least one."""
    largest = sympy.expand(expression)
    for dim, size in enumerate(shape):
        factor = largest.coeff(_index_symbol(dim))
        largest = sympy.expand(
            largest - factor * _index_symbol(dim) + sympy.Max(factor, 0) * (_size_expression(size) - 1)
        )
    sizes = sorted(largest.free_symbols, key=str)
    if any(s.name.startswith("index") for s in sizes):
        return False
    polynomial = sympy.Poly(largest.subs({s: s + 1 for s in sizes}), *sizes) if sizes else None
    return bool(all(c <= 0 for c in polynomial.coeffs()) if polynomial is not None else largest <= 0)


def _mask_condition(reader: _Reader, mask: fx.Node) -> _Condition | None:
    """The condition under which a query sees a key, without the inequalities that always hold.

    The mask has booleans, or zeros and numbers that are low enough to hide a key. None for other masks.
    """
    if op_name(mask) == "aten.where":
        condition, seen, unseen = mask.args
        if not _is_number(seen, lambda n: n == 0) or not _is_number(unseen, lambda n: n <= -1e30):
            return None
        mask = condition
    value = reader.values.get(mask)
    if not isinstance(value, _Condition):
        return None
    return _Condition(e for e in value if not _always(e, local(mask).shape))


def _is_number(x: Any, fits: Callable[[float], bool]) -> bool:
    """Whether an argument is one number everywhere, and this number fits."""
    while isinstance(x, fx.Node) and op_name(x) in ("aten.expand", "aten.to", "aten.unsqueeze", "aten.scalar_tensor"):
        x = x.args[0]
    if isinstance(x, fx.Node) and op_name(x) == "aten.full":
        x = x.args[1]
    return isinstance(x, (int, float)) and fits(x)


def _causal_condition(shape: Sequence[Size]) -> _Condition:
    """The condition of a causal mask of this shape: the key's index is at most the query's."""
    return _Condition({_index_symbol(len(shape) - 1) - _index_symbol(len(shape) - 2)})


def causal(graph: fx.Graph) -> int:
    """Give attention ``is_causal`` in place of a causal mask, and no mask in place of one that masks nothing.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        The number of attentions that no longer read a mask.
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
        condition, shape = _mask_condition(reader, mask), local(mask).shape
        if condition is None or len(shape) < 2:
            continue
        query, key = (local(n).shape for n in node.args[:2])
        if condition and (condition != _causal_condition(shape) or query[-2] != key[-2]):
            continue
        rest = [*node.args[3:], *[None, 0.0, False][len(node.args) - 3 :]][:3]
        dropout, was_causal = node.kwargs.get("dropout_p", rest[1]), node.kwargs.get("is_causal", rest[2])
        if was_causal:
            continue
        node.args = node.args[:3]
        node.kwargs = {
            **{k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")},
            **({"dropout_p": dropout} if dropout else {}),
            **({"is_causal": True} if condition else {}),
        }
        count += 1
    remove_dead_code(graph)
    return count


def _mask(node: fx.Node) -> Any:
    """The mask that an attention reads, or None."""
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
