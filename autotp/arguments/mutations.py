"""changes: what a call changes in the objects that it is passed, found in their forms before and after."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotp.arguments.object_tree import (
    ConstantLeaf,
    ContainerSpec,
    IntLeaf,
    ObjectSpec,
    TensorLeaf,
    UnseenError,
)
from autotp.errors import CaptureError

__all__ = ["GONE", "Change", "StateLocation", "changes", "overwrite"]

GONE = ConstantLeaf(type(None), "gone", None)
"""What is in a place that is empty now."""


def overwrite(held: Any, key: Any, new: torch.Tensor) -> None:
    """Give a tensor that an object, list or dict holds other values, in place; gradients follow, as the model's do."""
    if new.shape != (old := held[key]).shape:  # a whole one, of which this rank keeps its part from now on
        held[key] = new
    elif new is not old:
        follows = torch.is_grad_enabled() and new.requires_grad
        with torch.set_grad_enabled(follows):
            plain = old._is_view() and not (follows or old.requires_grad)
            (old.detach() if plain else old).copy_(new)  # of some views, as of compiled code's results, torch says no


@dataclass(frozen=True)
class Change:
    """What a call changes in an object.

    Attributes:
        path: the way to what holds it: names, numbers and keys.
        key: the name, number or key there.
        form: what is there now, of the call's results; :data:`GONE` for nothing.
        inside: whether a tensor was changed in place, and stays the same one.
    """

    path: tuple[Any, ...]
    key: Any
    form: ObjectSpec
    inside: bool = False


def _stays(before: ObjectSpec | None, after: ObjectSpec, same: Collection[tuple[int, int]]) -> bool:
    """Whether what is in a place stays what it is, whatever changes in it: a tuple only if all in it does."""
    if isinstance(before, TensorLeaf) and isinstance(after, TensorLeaf):
        return (before.index, after.index) in same
    if not isinstance(before, ContainerSpec) or not isinstance(after, ContainerSpec):
        return isinstance(before, ConstantLeaf) and before == after
    if before.cls is not after.cls or not issubclass(before.cls, tuple):
        return before.cls is after.cls
    alike = len(before.forms) == len(after.forms)
    return alike and all(_stays(old, new, same) for old, new in zip(before.forms, after.forms, strict=True))


def changes(
    before: ObjectSpec, after: ObjectSpec, same: Collection[tuple[int, int]], path: tuple[Any, ...] = ()
) -> Iterator[Change]:
    """What is different about an object after a call.

    Args:
        before: its form, whose leaves are the arguments.
        after: its form, whose leaves are the results.
        same: pairs of an argument and a result that are one and the same tensor, changed or not.
        path: the way to it.

    Raises:
        UnseenError: the object itself would have to be another one.
    """
    if not isinstance(before, ContainerSpec) or not isinstance(after, ContainerSpec) or before.cls is not after.cls:
        raise UnseenError(f"{path} became another object")
    had, has = before.items, after.items
    for key in reversed([k for k in had if k not in has]):
        yield Change(path, key, GONE)
    for key, form in has.items():
        old = had.get(key)
        if isinstance(old, TensorLeaf) and isinstance(form, TensorLeaf) and (old.index, form.index) in same:
            yield Change(path, key, form, inside=True)
        elif isinstance(old, ContainerSpec) and isinstance(form, ContainerSpec) and _stays(old, form, same):
            yield from changes(old, form, same, (*path, key))
        elif isinstance(form, (TensorLeaf, IntLeaf)) or old != form:
            yield Change(path, key, form)


class ChangedError(CaptureError):
    """A call changes plain arguments: it writes into tensors, or puts others into containers.

    Attributes:
        places: the arguments, by number or keyword.
    """

    def __init__(self, message: str, places: Collection[int | str], *, place: str = "") -> None:
        super().__init__(message, place=place)
        self.places = frozenset(places)


class KeptError(CaptureError):
    """A forward keeps something on the model's modules from one call to the next.

    Attributes:
        places: where.
    """

    def __init__(self, message: str, places: Collection[StateLocation], *, reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.places = frozenset(places)


@dataclass(frozen=True)
class StateLocation:
    """Where something is kept.

    Attributes:
        module: the module's name in the model; ``""``: the model itself.
        key: the name of the attribute, or buffer.
        buffer: whether it is a buffer.
        sharded: whether each rank keeps its own share of it.
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
        """What has it under its key."""
        module = model.get_submodule(self.module)
        return module._buffers if self.buffer else module.__dict__
