"""object_tree: flatten objects that a call reads and mutates, such as a cache of keys and values, and rebuild them.

torch's pytree cannot see into such objects. They are flattened here: an object's attributes, and the lists and dicts in
them, down to tensors and constants. The tree of classes, names and keys is the object's *spec* (:data:`ObjectSpec`);
the tensors are leaves of the call like any other. A graph returns the leaves of the spec that the object has after the
call, and the mutations are then applied to the object that was passed.

Between calls every rank keeps its own shards of the tensors in transformers' caches, and in objects of classes that
:func:`sharded_state` has marked. Tensors in all other objects are replicated.

An integer that a call changes (how many tokens a cache has seen) is a counter. It is a leaf too: a tensor of that many
elements that takes no memory, so that its size is as symbolic as the length of a sequence. An integer that no call was
seen to change is a constant, and each value needs a graph of its own.
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
"""The attributes that are counters: the object's class, and the attribute's name."""


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor: its position among the leaves."""

    index: int


@dataclass(frozen=True)
class IntLeaf:
    """A counter: its position among the leaves."""

    index: int


@dataclass(frozen=True)
class ConstantLeaf:
    """A value that is part of the spec; two are equal if their types and texts are."""

    kind: type
    text: str
    value: Any = field(compare=False, repr=False)


@dataclass(frozen=True)
class ContainerSpec:
    """An object, list, tuple or dict: its class, and the specs of its items by name, position or key."""

    cls: type
    keys: tuple[Any, ...]
    forms: tuple[ObjectSpec, ...]

    @property
    def items(self) -> dict[Any, ObjectSpec]:
        """The specs of the items by key."""
        return dict(zip(self.keys, self.forms, strict=True))


ObjectSpec = TensorLeaf | IntLeaf | ConstantLeaf | ContainerSpec

_CONTAINERS = (list, tuple, dict)
_MARKED: set[type] = set()
_LARGEST = 1 << 31
"""An integer from here on is no counter: torch refuses tensors of so many elements, even if they take no memory."""

C = TypeVar("C", bound=type)


def sharded_state(cls: C) -> C:
    """Class decorator: between calls each rank keeps only its own shards of the tensors in objects of the class.

    Use it for a key-value cache of your own that is passed to the model, if only the model reads and changes its
    tensors. The caches of transformers need no mark.

    Example:
        >>> @autotp.sharded_state
        ... class Cache:
        ...     def __init__(self): self.keys, self.values = [], []
    """
    _MARKED.add(cls)
    return cls


def is_sharded(cls: type) -> bool:
    """Whether ranks keep their own shards of the tensors in objects of a class."""
    module = sys.modules.get("transformers.cache_utils")
    return any(c in _MARKED for c in cls.__mro__) or (module is not None and issubclass(cls, module.Cache))


def is_object(x: Any) -> bool:
    """Whether a leaf of pytree's is an object to flatten here."""
    return hasattr(x, "__dict__") and not isinstance(x, (torch.Tensor, enum.Enum)) and not callable(x)


def _is_registered(x: Any) -> bool:
    """Whether pytree would flatten an object that has to be flattened here, as its class is registered with pytree."""
    return type(x) in pytree.SUPPORTED_NODES and is_sharded(type(x))


def plain_leaves(tree: Any) -> tuple[list[Any], Any]:
    """Flatten a tree with pytree, but leave sharded state as leaves; returns the leaves and pytree's spec."""
    return pytree.tree_flatten(tree, is_leaf=_is_registered)


def _loses_something(x: Any) -> bool:
    """Whether rebuilding a container from its items would lose something."""
    return isinstance(x, defaultdict) or (isinstance(x, list) and bool(getattr(x, "__dict__", None)))


class UnseenError(Exception):
    """An object holds something that autotp cannot see into."""


class ObjectFlattener:
    """Flattens objects, whose leaves get consecutive positions.

    Args:
        counts: the attributes that are counters; None if only symbolic integers are counters.
        first: the position of the first leaf.

    Attributes:
        leaves: the leaves of all objects so far.
        paths: the paths of the leaves.
        numbers: all integers so far, by path, each with the attribute that it is in.
    """

    def __init__(self, counts: Counts | None = (), first: int = 0) -> None:
        self.leaves: list[Any] = []
        self.paths: list[str] = []
        self.numbers: dict[str, tuple[tuple[type, str], Any]] = {}
        self._counts, self._first = counts, first
        self._seen: dict[Any, int] = {}
        self._inside: set[int] = set()

    def flatten(self, x: Any, path: str = "", owner: type = object, name: str = "") -> ObjectSpec:
        """Add the leaves of an object to the others; returns the object's spec.

        Args:
            x: the object.
            path: its path, for the paths of its leaves.
            owner: the class of the object that it is an attribute of.
            name: the attribute.

        Raises:
            UnseenError: the object holds something that autotp cannot see into.
        """
        kind = type(x)
        if isinstance(x, torch.Tensor):
            return TensorLeaf(self._add(id(x), x, path))
        if isinstance(x, torch.SymInt) or kind is int:
            self.numbers[path] = (owner, name), x
            is_size = kind is int and 0 <= x < _LARGEST and self._counts is not None
            if kind is not int or (is_size and (x in (0, 1) or (owner, name) in self._counts)):  # type: ignore[operator]
                return IntLeaf(self._add((owner, name, str(x)), x, path))
        if isinstance(x, (*CONSTANTS, type)):
            return ConstantLeaf(kind, repr(x), x)
        if not (isinstance(x, _CONTAINERS) or hasattr(x, "__dict__")) or isinstance(x, torch.nn.Module) or callable(x):
            raise UnseenError(f"{path or 'it'} is a {kind.__module__}.{kind.__qualname__}")
        if isinstance(x, _CONTAINERS) and _loses_something(x):
            raise UnseenError(
                f"{path or 'it'} is a {kind.__module__}.{kind.__qualname__}, which holds more than its items"
            )
        if id(x) in self._inside:
            raise UnseenError(f"{path or 'it'} holds itself")
        self._inside.add(id(x))
        dot = "." if path else ""
        if isinstance(x, dict):
            keys = tuple(x)
            forms = tuple(self.flatten(x[k], f"{path}[{k!r}]", owner, f"{name}[{k!r}]") for k in keys)
        elif isinstance(x, (list, tuple)):
            keys = tuple(range(len(x)))
            forms = tuple(self.flatten(v, f"{path}[{i}]", owner, f"{name}[]") for i, v in enumerate(x))
        else:
            keys = tuple(x.__dict__)
            forms = tuple(self.flatten(x.__dict__[k], f"{path}{dot}{k}", kind, k) for k in keys)
        self._inside.discard(id(x))
        return ContainerSpec(kind, keys, forms)

    def slots(self, sharded: bool) -> list[Slot]:
        """The slots of the leaves.

        Args:
            sharded: whether each rank keeps its own shards of the object's tensors.
        """
        return [
            Slot(p, sharded and isinstance(x, torch.Tensor), not isinstance(x, torch.Tensor))
            for p, x in zip(self.paths, self.leaves, strict=True)
        ]

    def counted(self, before: Mapping[str, Any]) -> set[tuple[type, str]]:
        """The attributes that are counters: their integers are symbolic, or differ from those ``before`` (by path)."""
        return {
            attribute
            for path, (attribute, x) in self.numbers.items()
            if isinstance(x, torch.SymInt) or (path in before and before[path] != x)
        }

    def _add(self, key: Any, x: Any, path: str) -> int:
        """The position of a leaf, which is added unless one with this key has been before."""
        index = self._seen.setdefault(key, self._first + len(self.leaves))
        if index == self._first + len(self.leaves):
            self.leaves.append(x)
            self.paths.append(path)
        return index


def build(spec: ObjectSpec, leaves: Sequence[Any]) -> Any:
    """Build a new object from its spec and leaves."""
    if isinstance(spec, (TensorLeaf, IntLeaf)):
        return leaves[spec.index]
    if isinstance(spec, ConstantLeaf):
        return spec.value
    values = [build(item, leaves) for item in spec.forms]
    if issubclass(spec.cls, dict):
        return spec.cls(zip(spec.keys, values, strict=True))
    if issubclass(spec.cls, (list, tuple)):
        return spec.cls(*values) if hasattr(spec.cls, "_fields") else spec.cls(values)
    instance = spec.cls.__new__(spec.cls)
    instance.__dict__.update(zip(spec.keys, values, strict=True))
    return instance


@functools.lru_cache(maxsize=64)
def counted(number: int) -> torch.Tensor:
    """A counter as a leaf: a tensor of that many elements that takes no memory."""
    return torch.empty(()).expand(number)


@dataclass(frozen=True)
class Slot:
    """The place of a leaf in an object.

    Attributes:
        path: the path from the object to the leaf.
        sharded: whether each rank keeps its own shard of the leaf.
        count: whether the leaf is a counter.
    """

    path: str
    sharded: bool
    count: bool
