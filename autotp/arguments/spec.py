"""spec: how a call's leaves go together: flatten and unflatten args and kwargs.

Python's sets of strings have an order of their own in each process, and models make dicts (of masks, by kind of
layer) from them. So leaves are taken in the order of the sorted keys, the same on every rank, and the dict that is
made of them again has the order that this rank's had.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autotp.arguments.boxed import Boxed, ModuleState
from autotp.arguments.object_tree import (
    ContainerSpec,
    Counts,
    ObjectFlattener,
    ObjectSpec,
    Slot,
    UnseenError,
    build,
    counted,
    is_object,
    is_sharded,
    plain_leaves,
)

__all__ = ["CallSpec", "ObjectLeaf", "Orders", "flatten_call", "reordered", "sorted_by_key"]

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


@dataclass(frozen=True)
class ObjectLeaf:
    """An object among a call's arguments: its form, and its leaves' slots."""

    form: ObjectSpec
    slots: tuple[Slot, ...]
    numbers: tuple[tuple[str, int], ...] = field(compare=False)


@dataclass(frozen=True)
class CallSpec:
    """How the leaves of a call's arguments go together.

    Attributes:
        spec: pytree's.
        states: per leaf of pytree's, the object that it is, if it is one.
        orders: how the dicts among them were ordered (:mod:`autotp.arguments.spec`); no part of the text that ranks
            compare.
    """

    spec: Any
    states: tuple[ObjectLeaf | None, ...]
    orders: Orders = field(default=(), repr=False)

    def close(self, leaves: Sequence[Any]) -> Any:
        """Arguments of these leaves, counts as numbers; the objects are new ones."""
        given = iter(leaves)
        plain = []
        for state in self.states:
            if state is None:
                plain.append(next(given))
            else:
                held = [next(given) for _ in state.slots]
                numbers = [x.shape[0] if slot.count else x for x, slot in zip(held, state.slots, strict=True)]
                plain.append(build(state.form, numbers))
        args, kwargs = pytree.tree_unflatten(plain, self.spec)
        return reordered(args, kwargs, self.orders) if self.orders else (args, kwargs)

    @functools.cached_property
    def slots(self) -> dict[int, Slot]:
        """The slots of the leaves that are in objects."""
        found: dict[int, Slot] = {}
        at = 0
        for state in self.states:
            found |= {at + i: slot for i, slot in enumerate(state.slots)} if state is not None else {}
            at += 1 if state is None else len(state.slots)
        return found

    @functools.cached_property
    def owners(self) -> dict[int, type]:
        """The classes of the objects that leaves are in."""
        found: dict[int, type] = {}
        at = 0
        for state in self.states:
            if state is not None and isinstance(state.form, ContainerSpec):
                found |= dict.fromkeys(range(at, at + len(state.slots)), state.form.cls)
            at += 1 if state is None else len(state.slots)
        return found

    def places(self) -> list[str]:
        """``args[0]``, ``kwargs['cache']``: what the caller calls each leaf of pytree's."""
        args, kwargs = pytree.tree_unflatten(list(range(len(self.states))), self.spec)
        return [
            name + pytree.keystr(path)
            for name, part in (("args", args), ("kwargs", kwargs))
            for path, _ in pytree.tree_flatten_with_path(part)[0]
        ]

    def paths(self) -> list[str]:
        """``args[0]``, ``kwargs['cache'].layers[0].keys``: what the caller calls each leaf."""
        found = []
        for name, state in zip(self.places(), self.states, strict=True):
            if state is None:
                found.append(name)
            elif isinstance(state.form, ContainerSpec) and state.form.cls is Boxed:
                found += [name + slot.path.removeprefix("it") for slot in state.slots]
            elif isinstance(state.form, ContainerSpec) and issubclass(state.form.cls, ModuleState):
                found += [f"state.{slot.path}" for slot in state.slots]
            else:
                found += [f"{name}.{slot.path}" for slot in state.slots]
        return found

    def keys(self) -> list[int | str]:
        """The argument that each leaf is, or is in: its number, or its keyword."""
        args, kwargs = pytree.tree_unflatten(list(range(len(self.states))), self.spec)
        found: list[int | str] = []
        for key, argument in (*enumerate(args), *kwargs.items()):
            for i in pytree.tree_leaves(argument):
                state = self.states[i]
                found += [key] * (1 if state is None else len(state.slots))
        return found


def flatten_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], counts: Counts = ()
) -> tuple[list[Any], CallSpec, list[Any]]:
    """The leaves of arguments, how they go together, and the objects among them.

    Args:
        args: tuples, lists, dicts and what pytree knows, of tensors, constants and objects.
        kwargs: the same by keyword.
        counts: the attributes of such objects that are counts.
    """
    args, kwargs, orders = sorted_by_key(args, kwargs)
    plain, spec = plain_leaves((args, kwargs))
    leaves: list[Any] = []
    states: list[ObjectLeaf | None] = []
    objects = []
    for x in plain:
        state = None
        if is_object(x):
            opener = ObjectFlattener(counts)
            with contextlib.suppress(UnseenError):  # a leaf then, which is refused where it matters
                form = opener.open(x)
                numbers = tuple((path, n) for path, (_, n) in opener.numbers.items())
                state = ObjectLeaf(form, tuple(opener.slots(is_sharded(type(x)))), numbers)
        states.append(state)
        if state is None:
            leaves.append(x)
        else:
            leaves += [x if isinstance(x, torch.Tensor) else counted(x) for x in opener.leaves]
            objects.append(x)
    return leaves, CallSpec(spec, tuple(states), orders), objects
