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

__all__ = ["GONE", "InputMutation", "Mutation", "StateLocation", "StateMutation", "diff", "overwrite"]

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
class Mutation:
    """What a call changes in an object.

    Attributes:
        path: the way to what holds it: names, numbers and keys.
        key: the name, number or key there.
        new: the item after the call, made of the call's results; :data:`GONE` for none.
        in_place: whether the item is the same tensor, with other values.
    """

    path: tuple[Any, ...]
    key: Any
    new: ObjectSpec
    in_place: bool = False


def _is_same_object(before: ObjectSpec | None, after: ObjectSpec, same: Collection[tuple[int, int]]) -> bool:
    """Whether what is in a place stays what it is, whatever changes in it: a tuple only if all in it does."""
    if isinstance(before, TensorLeaf) and isinstance(after, TensorLeaf):
        return (before.index, after.index) in same
    if not isinstance(before, ContainerSpec) or not isinstance(after, ContainerSpec):
        return isinstance(before, ConstantLeaf) and before == after
    if before.cls is not after.cls or not issubclass(before.cls, tuple):
        return before.cls is after.cls
    alike = len(before.forms) == len(after.forms)
    return alike and all(_is_same_object(old, new, same) for old, new in zip(before.forms, after.forms, strict=True))


def diff(
    before: ObjectSpec, after: ObjectSpec, same: Collection[tuple[int, int]], path: tuple[Any, ...] = ()
) -> Iterator[Mutation]:
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
        yield Mutation(path, key, GONE)
    for key, form in has.items():
        old = had.get(key)
        if isinstance(old, TensorLeaf) and isinstance(form, TensorLeaf) and (old.index, form.index) in same:
            yield Mutation(path, key, form, in_place=True)
        elif isinstance(old, ContainerSpec) and isinstance(form, ContainerSpec) and _is_same_object(old, form, same):
            yield from diff(old, form, same, (*path, key))
        elif isinstance(form, (TensorLeaf, IntLeaf)) or old != form:
            yield Mutation(path, key, form)


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
        """The error for a call of which this cannot be captured."""
        return CaptureError(self.message)


@dataclass(frozen=True)
class StateMutation:
    """A forward keeps something on modules from one call to the next.

    Attributes:
        message: what happened, for a person.
        locations: where it is kept.
        reason: the same in a few words, for a graph break.
    """

    message: str
    locations: frozenset[StateLocation]
    reason: str = ""

    def error(self) -> CaptureError:
        """The error for a call of which this cannot be captured."""
        return CaptureError(self.message, reason=self.reason)
