"""orders: dicts among a call's arguments, whose keys may come in another order in every process.

Python's sets of strings have an order of their own in each process, and models make dicts (of masks, by kind of
layer) from them. So leaves are taken in the order of the sorted keys, the same on every rank, and the dict that is
made of them again has the order that this rank's had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Orders", "reordered", "sorted_by_key"]

Orders = tuple[tuple[str, ...], ...]
"""The keys of each dict that was sorted, as they were."""

_NESTING = (dict, list, tuple)


def sorted_by_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Orders]:
    """Arguments in which the dicts are sorted, but not the keyword arguments themselves; and how they were.

    >>> sorted_by_key((1,), {"masks": {"sliding": 2, "full": 3}})
    ((1,), {'masks': {'full': 3, 'sliding': 2}}, (('sliding', 'full'),))
    """
    orders: list[tuple[str, ...]] = []
    if any(type(x) in _NESTING for x in (*args, *kwargs.values())):  # or all is in order
        args = tuple(_sorted(x, orders) for x in args)
        kwargs = {k: _sorted(x, orders) for k, x in kwargs.items()}
    return args, dict(kwargs), tuple(orders)


def reordered(args: tuple[Any, ...], kwargs: Mapping[str, Any], orders: Orders) -> tuple[Any, ...]:
    """The arguments that :func:`sorted_by_key` sorted."""
    each = iter(orders)
    return tuple(_reordered(x, each) for x in args), {k: _reordered(x, each) for k, x in kwargs.items()}


def _is_sortable(tree: Any) -> bool:
    return type(tree) is dict and all(type(k) is str for k in tree)


def _sorted(tree: Any, orders: list[tuple[str, ...]]) -> Any:
    if _is_sortable(tree):
        orders.append(tuple(tree))
        return {k: _sorted(tree[k], orders) for k in sorted(tree)}
    return type(tree)(_sorted(x, orders) for x in tree) if type(tree) in (list, tuple) else tree


def _reordered(tree: Any, orders: Iterator[tuple[str, ...]]) -> Any:
    if _is_sortable(tree):
        order = next(orders)
        values = {k: _reordered(x, orders) for k, x in tree.items()}
        return {k: values[k] for k in order}
    return type(tree)(_reordered(x, orders) for x in tree) if type(tree) in (list, tuple) else tree
