"""mutations: the changes that a call makes to its arguments and to modules, found by comparing before and after."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotp.arguments.object_tree import (
    ConstantLeaf,
    ContainerSpec,
    ObjectSpec,
    TensorLeaf,
    UnseenError,
)
from autotp.errors import CaptureError

__all__ = ["GONE", "InputMutation", "Mutation", "StateLocation", "StateMutation", "changed_items", "diff",
           "overwrite"]  # fmt: skip

GONE = ConstantLeaf(type(None), "gone", None)
"""Stands for the item that a mutation has removed."""


def overwrite(container: Any, key: Any, new: torch.Tensor) -> None:
    """Write new values into the tensor under a key of a container, in place; gradients flow as in the model's write.

    Args:
        container: a dict (such as an object's attributes) or list.
        key: the key or position of the tensor.
        new: the values. If their shape differs, the tensor had its full size, and this rank keeps a shard from now on.
    """
    if new.shape != (old := container[key]).shape:
        container[key] = new
    elif new is not old:
        follows = torch.is_grad_enabled() and new.requires_grad
        with torch.set_grad_enabled(follows):
            detached = old._is_view() and not (follows or old.requires_grad)
            (old.detach() if detached else old).copy_(new)  # torch refuses some views, as of compiled code's results


@dataclass(frozen=True)
class Mutation:
    """A change that a call makes to one item of an object.

    Attributes:
        path: the path from the object to the container of the item: attribute names, positions and keys.
        key: the item's name, position or key in the container; None if the item is the whole container.
        old: the item before the call; :data:`GONE` for an item that was not there.
        new: the item after the call; :data:`GONE` for a removed item. Where specs are compared, it is a spec, whose
            leaves are the call's results.
        in_place: whether the item is the same tensor as before, with other values.
    """

    path: tuple[Any, ...]
    key: Any
    old: Any
    new: Any
    in_place: bool = False

    @property
    def name(self) -> str:
        """The item's path as a text, such as ``layers.0.last``."""
        return ".".join(str(k) for k in (*self.path, self.key) if k not in ("", None))


def changed_items(
    old: Mapping[Any, Any], new: Mapping[Any, Any], is_same: Callable[[Any, Any], bool]
) -> Iterator[tuple[Any, Any, Any]]:
    """The items of a container that are not the same before and after a call: key, old and new item.

    Removed items come first, the last one at the beginning, so that the positions of a list stay right.

    Args:
        old: the items before.
        new: the items after.
        is_same: compares an old item with a new one.
    """
    yield from ((key, old[key], GONE) for key in reversed(list(old)) if key not in new)
    for key, item in new.items():
        before = old.get(key, GONE)
        if before is GONE or not is_same(before, item):
            yield key, before, item


def _is_same_object(before: ObjectSpec | None, after: ObjectSpec, same: Collection[tuple[int, int]]) -> bool:
    """Whether an item is still the same object; its content may differ, but a tuple's items must be the same."""
    if isinstance(before, TensorLeaf) and isinstance(after, TensorLeaf):
        return (before.index, after.index) in same
    if not isinstance(before, ContainerSpec) or not isinstance(after, ContainerSpec):
        return isinstance(before, ConstantLeaf) and before == after
    if before.cls is not after.cls or not issubclass(before.cls, tuple):
        return before.cls is after.cls
    same_length = len(before.forms) == len(after.forms)
    return same_length and all(
        _is_same_object(old, new, same) for old, new in zip(before.forms, after.forms, strict=True)
    )


def diff(
    before: ObjectSpec, after: ObjectSpec, same: Collection[tuple[int, int]], path: tuple[Any, ...] = ()
) -> Iterator[Mutation]:
    """The mutations of an object by a call.

    Args:
        before: the object's spec before the call; its leaves are the call's arguments.
        after: the object's spec after the call; its leaves are the call's results.
        same: the pairs of an argument and a result that are the same tensor, with the same or other values.
        path: the path to the object.

    Raises:
        UnseenError: the object itself was replaced by one of another class.
    """
    if not isinstance(before, ContainerSpec) or not isinstance(after, ContainerSpec) or before.cls is not after.cls:
        raise UnseenError(f"{path} became another object")
    for key, old, new in changed_items(before.items, after.items, _is_same_constant):
        if isinstance(old, TensorLeaf) and isinstance(new, TensorLeaf) and (old.index, new.index) in same:
            yield Mutation(path, key, old, new, in_place=True)
        elif isinstance(old, ContainerSpec) and isinstance(new, ContainerSpec) and _is_same_object(old, new, same):
            yield from diff(old, new, same, (*path, key))
        else:
            yield Mutation(path, key, old, new)


def _is_same_constant(old: ObjectSpec, new: ObjectSpec) -> bool:
    """Whether two specs are one constant; the leaves of specs cannot be compared, for their numbers differ."""
    return isinstance(new, ConstantLeaf) and old == new


@dataclass(frozen=True)
class StateLocation:
    """The attribute or buffer of a module that holds state.

    Attributes:
        module: the module's name in the model; ``""`` is the model itself.
        key: the name of the attribute or buffer.
        buffer: whether it is a buffer.
        sharded: whether each rank keeps its own shard of the state.
    """

    module: str
    key: str
    buffer: bool
    sharded: bool

    @property
    def name(self) -> str:
        """The fully qualified name."""
        return f"{self.module}.{self.key}" if self.module else self.key

    def holder(self, model: nn.Module) -> dict[str, Any]:
        """The module's dict that holds the state under :attr:`key`."""
        module = model.get_submodule(self.module)
        return module._buffers if self.buffer else module.__dict__


@dataclass(frozen=True)
class InputMutation:
    """A call mutates plain arguments: it writes into tensors, or puts other tensors into containers.

    Attributes:
        message: what happened, for a person.
        keys: the arguments, by position or keyword.
    """

    message: str
    keys: frozenset[int | str]

    def error(self) -> CaptureError:
        """The error to raise if a call with this mutation cannot be captured."""
        return CaptureError(self.message)


@dataclass(frozen=True)
class StateMutation:
    """A call changes state that modules keep from one call to the next.

    Attributes:
        message: what happened, for a person.
        locations: the attributes and buffers that hold the state.
        reason: the message in a few words, for a graph break.
    """

    message: str
    locations: frozenset[StateLocation]
    reason: str = ""

    def error(self) -> CaptureError:
        """The error to raise if a call with this mutation cannot be captured."""
        return CaptureError(self.message, reason=self.reason)
