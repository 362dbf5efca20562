"""spec: flatten a call's args and kwargs into leaves, and unflatten them.

Python's sets of strings have a different order in each process, and models make dicts (of masks, by kind of layer) from
them. So leaves are taken in the order of the sorted keys, which is the same on every rank. A dict that is unflattened
has the order that it had on this rank.
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
"""The keys of each sorted dict, in their original order."""

_NESTING = (dict, list, tuple)


def sorted_by_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Orders]:
    """Sort the dicts in arguments, but not the keywords; returns args, kwargs, and the original orders.

    >>> sorted_by_key((1,), {"masks": {"sliding": 2, "full": 3}})
    ((1,), {'masks': {'full': 3, 'sliding': 2}}, (('sliding', 'full'),))
    """
    orders: list[tuple[str, ...]] = []
    if any(type(x) in _NESTING for x in (*args, *kwargs.values())):  # otherwise there is no dict
        args = tuple(_sorted(x, orders) for x in args)
        kwargs = {k: _sorted(x, orders) for k, x in kwargs.items()}
    return args, dict(kwargs), tuple(orders)


def reordered(args: tuple[Any, ...], kwargs: Mapping[str, Any], orders: Orders) -> tuple[Any, ...]:
    """Give the dicts in arguments the order that they had before :func:`sorted_by_key`."""
    remaining = iter(orders)
    return tuple(_reordered(x, remaining) for x in args), {k: _reordered(x, remaining) for k, x in kwargs.items()}


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
    """An object among a call's arguments.

    Attributes:
        form: the object's spec.
        slots: the slots of its leaves.
        numbers: the integers in it, by path.
    """

    form: ObjectSpec
    slots: tuple[Slot, ...]
    numbers: tuple[tuple[str, int], ...] = field(compare=False)


@dataclass(frozen=True)
class CallSpec:
    """The structure of a call's arguments, from which they are unflattened.

    Attributes:
        spec: pytree's spec.
        states: for each of pytree's leaves the object that it is; None for a plain leaf.
        orders: the orders of the dicts before they were sorted; ranks do not compare these.
    """

    spec: Any
    states: tuple[ObjectLeaf | None, ...]
    orders: Orders = field(default=(), repr=False)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The args and kwargs that have these leaves, with counters as integers; the objects are new ones."""
        remaining = iter(leaves)
        plain = []
        for state in self.states:
            if state is None:
                plain.append(next(remaining))
            else:
                own = [next(remaining) for _ in state.slots]
                values = [x.shape[0] if slot.count else x for x, slot in zip(own, state.slots, strict=True)]
                plain.append(build(state.form, values))
        args, kwargs = pytree.tree_unflatten(plain, self.spec)
        return reordered(args, kwargs, self.orders) if self.orders else (args, kwargs)

    @functools.cached_property
    def slots(self) -> dict[int, Slot]:
        """The slots of the leaves that are in objects, by the leaf's position."""
        slots: dict[int, Slot] = {}
        first = 0
        for state in self.states:
            slots |= {first + i: slot for i, slot in enumerate(state.slots)} if state is not None else {}
            first += 1 if state is None else len(state.slots)
        return slots

    @functools.cached_property
    def owners(self) -> dict[int, type]:
        """The object's class for each leaf that is in an object, by the leaf's position."""
        owners: dict[int, type] = {}
        first = 0
        for state in self.states:
            if state is not None and isinstance(state.form, ContainerSpec):
                owners |= dict.fromkeys(range(first, first + len(state.slots)), state.form.cls)
            first += 1 if state is None else len(state.slots)
        return owners

    def places(self) -> list[str]:
        """The caller's name for each of pytree's leaves: ``args[0]``, ``kwargs['cache']``."""
        args, kwargs = pytree.tree_unflatten(list(range(len(self.states))), self.spec)
        return [
            name + pytree.keystr(path)
            for name, tree in (("args", args), ("kwargs", kwargs))
            for path, _ in pytree.tree_flatten_with_path(tree)[0]
        ]

    def paths(self) -> list[str]:
        """The caller's name for each leaf: ``args[0]``, ``kwargs['cache'].layers[0].keys``."""
        paths = []
        for name, state in zip(self.places(), self.states, strict=True):
            if state is None:
                paths.append(name)
            elif isinstance(state.form, ContainerSpec) and state.form.cls is Boxed:
                paths += [name + slot.path.removeprefix("it") for slot in state.slots]
            elif isinstance(state.form, ContainerSpec) and issubclass(state.form.cls, ModuleState):
                paths += [f"state.{slot.path}" for slot in state.slots]
            else:
                paths += [f"{name}.{slot.path}" for slot in state.slots]
        return paths

    def keys(self) -> list[int | str]:
        """The position or keyword of the argument that each leaf is, or is in."""
        args, kwargs = pytree.tree_unflatten(list(range(len(self.states))), self.spec)
        keys: list[int | str] = []
        for key, argument in (*enumerate(args), *kwargs.items()):
            for i in pytree.tree_leaves(argument):
                state = self.states[i]
                keys += [key] * (1 if state is None else len(state.slots))
        return keys


def flatten_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], counts: Counts = ()
) -> tuple[list[Any], CallSpec, list[Any]]:
    """Flatten a call's arguments; returns the leaves, their spec, and the objects among the arguments.

    Args:
        args: tensors, constants and objects, in tuples, lists, dicts and other containers that pytree knows.
        kwargs: the same, by keyword.
        counts: the attributes of the objects that are counters.
    """
    args, kwargs, orders = sorted_by_key(args, kwargs)
    plain, spec = plain_leaves((args, kwargs))
    leaves: list[Any] = []
    states: list[ObjectLeaf | None] = []
    objects = []
    for x in plain:
        state = None
        if is_object(x):
            flattener = ObjectFlattener(counts)
            with contextlib.suppress(UnseenError):  # it stays a leaf, which is refused where it matters
                form = flattener.flatten(x)
                numbers = tuple((path, n) for path, (_, n) in flattener.numbers.items())
                state = ObjectLeaf(form, tuple(flattener.slots(is_sharded(type(x)))), numbers)
        states.append(state)
        if state is None:
            leaves.append(x)
        else:
            leaves += [x if isinstance(x, torch.Tensor) else counted(x) for x in flattener.leaves]
            objects.append(x)
    return leaves, CallSpec(spec, tuple(states), orders), objects
