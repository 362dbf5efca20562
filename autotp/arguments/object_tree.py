"""states: objects among a call's arguments that the call reads and changes, such as a cache of keys and values.

torch's pytree cannot see into them, so they are opened here: an object's attributes, and the lists and
dicts in them, down to tensors and constants. What is in which place is the object's *form*; the tensors are
leaves of the call like any other. A call gives the leaves of the form that it leaves behind, and the object
that was passed gets what has changed, in place.

Of caches of transformers, and classes that :func:`sharded_state` has marked, every rank keeps its own share
between calls; all other objects hold whole values.

A number that a call changes (how many tokens a cache has seen) is a count, and a leaf too: a tensor of that
many elements that takes no memory, so that its size is as symbolic as a sequence's length. Numbers that no
call has been seen to change are constants, a graph for each.
"""

from __future__ import annotations

import enum
import functools
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from autotp.utils.value_types import CONSTANTS

__all__ = [
    "ConstantLeaf",
    "ContainerSpec",
    "Counts",
    "IntLeaf",
    "ObjectFlattener",
    "ObjectSpec",
    "Slot",
    "TensorLeaf",
    "UnseenError",
    "build",
    "counted",
    "is_object",
    "is_sharded",
    "plain_leaves",
    "sharded_state",
]

Counts = Collection[tuple[type, str]]
"""The attributes that calls were seen to count in, with their objects' classes."""


@dataclass(frozen=True)
class TensorLeaf:
    """The place of a tensor."""

    index: int


@dataclass(frozen=True)
class IntLeaf:
    """The place of a number that calls change."""

    index: int


@dataclass(frozen=True)
class ConstantLeaf:
    """A value that is all that its text says."""

    kind: type
    text: str
    value: Any = field(compare=False, repr=False)


@dataclass(frozen=True)
class ContainerSpec:
    """An object, list, tuple or dict: its class, and what is under which name, number or key."""

    cls: type
    keys: tuple[Any, ...]
    forms: tuple[ObjectSpec, ...]

    @property
    def items(self) -> dict[Any, ObjectSpec]:
        """What is in it."""
        return dict(zip(self.keys, self.forms, strict=True))


ObjectSpec = TensorLeaf | IntLeaf | ConstantLeaf | ContainerSpec

_CONTAINERS = (list, tuple, dict)
_MARKED: set[type] = set()
_LARGEST = 1 << 31
"""Numbers from here on are no counts: a tensor of so many elements, though it takes no memory, is none to torch."""

C = TypeVar("C", bound=type)


def sharded_state(cls: C) -> C:
    """Class decorator: between calls each rank keeps only its own share of the tensors in such objects.

    For a key-value cache of your own that is passed to the model, read by it and changed by it, and whose
    tensors nothing else reads. Caches of transformers are such already.

    Example:
        >>> @autotp.sharded_state
        ... class Cache:
        ...     def __init__(self): self.keys, self.values = [], []
    """
    _MARKED.add(cls)
    return cls


def is_sharded(cls: type) -> bool:
    """Whether ranks keep their own shares of the tensors in objects of a class."""
    module = sys.modules.get("transformers.cache_utils")
    return any(c in _MARKED for c in cls.__mro__) or (module is not None and issubclass(cls, module.Cache))


def is_object(x: Any) -> bool:
    """Whether a leaf of pytree's is an object to be opened."""
    return hasattr(x, "__dict__") and not isinstance(x, (torch.Tensor, enum.Enum)) and not callable(x)


def _is_registered(x: Any) -> bool:
    """Whether an object that is to be opened here is one that pytree has been told how to open."""
    return type(x) in pytree.SUPPORTED_NODES and is_sharded(type(x))


def plain_leaves(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree as pytree sees them, but objects that hold states unopened; and how they go together."""
    return pytree.tree_flatten(tree, is_leaf=_is_registered)


def _loses_something(x: Any) -> bool:
    """Whether a container cannot be made again of what is in it."""
    return isinstance(x, defaultdict) or (isinstance(x, list) and bool(getattr(x, "__dict__", None)))


class UnseenError(Exception):
    """Something is in an object into which autotp cannot see."""


class ObjectFlattener:
    """Opens objects.

    Args:
        counts: the attributes that are counts; None where those are that are symbolic.
        first: the number of the first leaf.

    Attributes:
        leaves: the leaves found so far.
        paths: their places.
        numbers: all numbers found, by place, each with the attribute that it was found in.
    """

    def __init__(self, counts: Counts | None = (), first: int = 0) -> None:
        self.leaves: list[Any] = []
        self.paths: list[str] = []
        self.numbers: dict[str, tuple[tuple[type, str], Any]] = {}
        self._counts, self._first = counts, first
        self._seen: dict[Any, int] = {}
        self._inside: set[int] = set()

    def open(self, x: Any, path: str = "", owner: type = object, name: str = "") -> ObjectSpec:
        """The form of an object, whose leaves are added to the others.

        Raises:
            UnseenError: there is something in it into which autotp cannot see.
        """
        kind = type(x)
        if isinstance(x, torch.Tensor):
            return TensorLeaf(self._add(id(x), x, path))
        if isinstance(x, torch.SymInt) or kind is int:
            self.numbers[path] = (owner, name), x
            size = kind is int and 0 <= x < _LARGEST and self._counts is not None
            if kind is not int or (size and (x in (0, 1) or (owner, name) in self._counts)):  # type: ignore[operator]
                return IntLeaf(self._add((owner, name, str(x)), x, path))
        if isinstance(x, (*CONSTANTS, type)):
            return ConstantLeaf(kind, repr(x), x)
        if not (isinstance(x, _CONTAINERS) or hasattr(x, "__dict__")) or isinstance(x, torch.nn.Module) or callable(x):
            raise UnseenError(f"{path or 'it'} is a {kind.__module__}.{kind.__qualname__}")
        if isinstance(x, _CONTAINERS) and _loses_something(x):
            raise UnseenError(f"{path or 'it'} is a {kind.__module__}.{kind.__qualname__}, more than what is in it")
        if id(x) in self._inside:
            raise UnseenError(f"{path or 'it'} holds itself")
        self._inside.add(id(x))
        dot = "." if path else ""
        if isinstance(x, dict):
            keys = tuple(x)
            forms = tuple(self.open(x[k], f"{path}[{k!r}]", owner, f"{name}[{k!r}]") for k in keys)
        elif isinstance(x, (list, tuple)):
            keys = tuple(range(len(x)))
            forms = tuple(self.open(v, f"{path}[{i}]", owner, f"{name}[]") for i, v in enumerate(x))
        else:
            keys = tuple(x.__dict__)
            forms = tuple(self.open(x.__dict__[k], f"{path}{dot}{k}", kind, k) for k in keys)
        self._inside.discard(id(x))
        return ContainerSpec(kind, keys, forms)

    def slots(self, sharded: bool) -> list[Slot]:
        """The leaves' slots, in an object of which each rank keeps its own share or not."""
        return [
            Slot(p, sharded and isinstance(x, torch.Tensor), not isinstance(x, torch.Tensor))
            for p, x in zip(self.paths, self.leaves, strict=True)
        ]

    def counted(self, before: Mapping[str, Any]) -> set[tuple[type, str]]:
        """The attributes that count: they are symbolic, or not what they were ``before``."""
        return {
            attribute
            for path, (attribute, x) in self.numbers.items()
            if isinstance(x, torch.SymInt) or (path in before and before[path] != x)
        }

    def _add(self, key: Any, x: Any, path: str) -> int:
        found = self._seen.setdefault(key, self._first + len(self.leaves))
        if found == self._first + len(self.leaves):
            self.leaves.append(x)
            self.paths.append(path)
        return found


def build(form: ObjectSpec, leaves: Sequence[Any]) -> Any:
    """A new object of this form."""
    if isinstance(form, (TensorLeaf, IntLeaf)):
        return leaves[form.index]
    if isinstance(form, ConstantLeaf):
        return form.value
    values = [build(f, leaves) for f in form.forms]
    if issubclass(form.cls, dict):
        return form.cls(zip(form.keys, values, strict=True))
    if issubclass(form.cls, (list, tuple)):
        return form.cls(*values) if hasattr(form.cls, "_fields") else form.cls(values)
    made = form.cls.__new__(form.cls)
    made.__dict__.update(zip(form.keys, values, strict=True))
    return made


@functools.lru_cache(maxsize=64)
def counted(number: int) -> torch.Tensor:
    """A number as a tensor of so many elements, which takes no memory."""
    return torch.empty(()).expand(number)


@dataclass(frozen=True)
class Slot:
    """A leaf's place in an object.

    Attributes:
        path: the way to it.
        sharded: whether each rank keeps its own share of it.
        count: whether it is a number.
    """

    path: str
    sharded: bool
    count: bool
