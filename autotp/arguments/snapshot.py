"""snapshot: the content of modules at one time, to find the changes that a forward makes on them, and to undo them.

A graph is a function of weights and inputs. A forward may also keep something on a module: a counter, the last hidden
state, another tensor in place of a buffer. Then a later call may compute another function, and the model is not
captured as it is. Allowed are only a number, flag or size that comes out the same if the next call finds it, and that
does not change what the call computes. Kept tensors are not allowed, even if they only depend on sizes (a mask, a table
of sines): a graph of the first call does not show whether a later call reads them, and what it then does.

State that is kept becomes an additional argument (:mod:`autotp.arguments.module_state`) if it can be flattened, and is
no list that gets longer, for which each call would need another graph. Otherwise the model is captured in parts.
"""

from __future__ import annotations

import contextlib
import types
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autotp.arguments.module_state import ModuleStateTracker
from autotp.arguments.mutations import GONE, Mutation, StateLocation, changed_items
from autotp.arguments.object_tree import ObjectFlattener, UnseenError
from autotp.modules.hooks import HOOKS
from autotp.utils.value_types import SCALARS

__all__ = [
    "ModuleMutation",
    "Snapshot",
    "is_alone",
    "restoring",
    "restoring_state",
    "shares_memory",
    "storage_of",
]

_CONTAINERS = (list, dict, set, deque)
_PLAIN = (*SCALARS, torch.dtype, torch.device)
_NO_OBJECTS = (torch.Tensor, nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType,
               types.ModuleType, np.ndarray)  # fmt: skip
_DEEPEST = 6


@dataclass(frozen=True)
class ModuleMutation(Mutation):
    """A change of one item that modules hold, which can be applied to them.

    Attributes:
        container: the container of the item: the dict of attributes, a dict, a list, a set.
        location: the attribute or buffer that the item is, or is in; None if there is none.
    """

    container: Any = None
    location: StateLocation | None = None

    @property
    def has_tensors(self) -> bool:
        """Whether the new item is a tensor, or holds one."""
        return any(True for _ in _tensors(self.new))

    @property
    def is_another(self) -> bool:
        """Whether old and new item differ even with symbolic sizes replaced by the numbers that they stand for."""
        return not _is_same(self.old, _without_symbols(self.new))

    @property
    def can_be_argument(self) -> bool:
        """Whether the item can be an argument of each call."""
        grows = self.key is None and not (isinstance(self.old, list) and len(self.old) == len(self.new))
        if self.location is None or grows:
            return False
        try:
            ObjectFlattener(None).flatten(None if self.new is GONE else self.new)
        except UnseenError:
            return False
        return True

    def apply(self) -> None:
        """Make the change, with numbers in place of symbolic sizes."""
        value = _without_symbols(self.new)
        if value is GONE:
            self.container.pop(self.key, None)
        elif self.key is None:
            _refill(self.container, value)
        else:
            self.container[self.key] = value


def _tensors(x: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors in a value, through containers and objects down to a certain depth."""
    if isinstance(x, torch.Tensor):
        yield x
    elif depth < _DEEPEST:
        items = x.values() if isinstance(x, dict) else x if isinstance(x, (*_CONTAINERS, tuple)) else ()
        for item in (*items, *(_attributes(x) or {}).values()):
            yield from _tensors(item, depth + 1)


def _without_symbols(x: Any) -> Any:
    """A value with symbolic numbers replaced by the numbers that they stand for."""
    if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return x.node.hint
    if type(x) in (list, tuple, torch.Size):
        return type(x)([_without_symbols(item) for item in x])
    return {k: _without_symbols(item) for k, item in x.items()} if type(x) is dict else x


def _attributes(x: Any) -> dict[str, Any] | None:
    """The attributes of an object; None if the value is no object, or one of autotp's own."""
    if isinstance(x, _NO_OBJECTS) or type(x).__module__.partition(".")[0] == "autotp":
        return None
    attributes = getattr(x, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None


def _slots(x: Any) -> dict[str, Any]:
    """The attributes of an object that are in ``__slots__``."""
    if isinstance(x, (*_NO_OBJECTS, *_PLAIN, *_CONTAINERS, tuple)):
        return {}
    names = [n for cls in type(x).__mro__ for n in _as_tuple(vars(cls).get("__slots__", ()))]
    return {n: getattr(x, n) for n in names if n not in ("__dict__", "__weakref__") and hasattr(x, n)}


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _refill(container: Any, content: Any) -> None:
    """Replace the content of a container in place."""
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _is_same(old: Any, new: Any) -> bool:
    """Whether two values are the same object, or equal values of types that are compared by value."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, (tuple, list, deque)):
        return len(old) == len(new) and all(map(_is_same, old, new))
    if isinstance(old, dict):
        return list(old) == list(new) and all(map(_is_same, old.values(), new.values()))
    return isinstance(old, (*_PLAIN, set)) and (bool(old == new) or old != old)


_Path = tuple[Any, ...]
_Owner = tuple[str, str | None, bool] | None
"""A module's name, the name of its attribute (None if the item's key is the name), and whether it is a buffer."""


def _location(owner: _Owner, key: Any) -> StateLocation | None:
    """The location of an item with a key, in a container that has this owner."""
    if owner is None:
        return None
    module, attribute, buffer = owner
    return StateLocation(module, key if attribute is None else attribute, buffer, False)


class Snapshot:
    """The content of a model's modules, and of the containers and objects that they hold, at one time.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._containers: list[tuple[_Path, Any, Any, _Owner]] = []
        self._slotted: list[tuple[_Path, Any, dict[str, Any]]] = []
        self._arrays: list[tuple[_Path, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self._values: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        seen: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for kind in ("_buffers", "_parameters", "_modules"):
                owner = (name, None, True) if kind == "_buffers" else None
                self._record((name,), module.__dict__[kind], seen, owner, _DEEPEST)
            self._containers.append(((name,), module.__dict__, dict(module.__dict__), (name, None, False)))
            for key, value in module.__dict__.items():
                if key not in HOOKS and key not in ("_buffers", "_parameters", "_modules"):
                    self._record((name, key), value, seen, (name, key, False))
        self._without_grad = [t for t in self.tensors() if not t.requires_grad and not isinstance(t, nn.Parameter)]

    def _record(self, path: _Path, x: Any, seen: set[int], owner: _Owner, depth: int = 0) -> None:
        """Record the content of a container, object or array, and of what it holds down to a certain depth."""
        if isinstance(x, _PLAIN) or id(x) in seen:
            return
        seen.add(id(x))
        items: list[tuple[Any, Any]] = []
        if isinstance(x, np.ndarray):
            self._arrays.append((path, x, x.copy()))
        elif isinstance(x, (*_CONTAINERS, tuple)):
            if not isinstance(x, tuple):
                self._containers.append((path, x, x.copy(), owner))
            items += x.items() if isinstance(x, dict) else enumerate(x)
        if attributes := _attributes(x):
            self._containers.append((path, attributes, dict(attributes), owner))
            items += attributes.items()
        if slots := _slots(x):
            self._slotted.append((path, x, slots))
            items += slots.items()
        for key, value in items if depth < _DEEPEST else ():
            self._record((*path, key), value, seen, owner, depth + 1)

    def copy_values(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy some tensors' values, too: writes into them are found, and undone by ``restore(values=True)``."""
        self._values += [(t, t.detach().clone(), t._version) for t in tensors]

    def written(self) -> list[torch.Tensor]:
        """The tensors with copied values that were written into since, by torch's version counter."""
        return [t for t, _, version in self._values if t._version != version]

    def diff(self) -> list[ModuleMutation]:
        """The changes since the snapshot was taken."""
        mutations = []
        for path, now, before, owner in self._containers:
            if isinstance(now, dict):
                for key, old, new in changed_items(before, now, _is_same):
                    mutations.append(ModuleMutation(path, key, old, new, container=now, location=_location(owner, key)))
            elif not (now == before if isinstance(now, set) else _is_same(list(before), list(now))):
                location = _location(owner, None)
                mutations.append(ModuleMutation(path, None, before, now.copy(), container=now, location=location))
        for path, x, before in self._slotted:
            if not _is_same(before, now := _slots(x)):  # the empty tensor makes it count as a kept tensor
                mutations.append(ModuleMutation(path, "slots", before, [now, torch.empty(0)], container={}))
        for path, array, values in self._arrays:
            if array.shape != values.shape or not np.array_equal(array, values):
                mutations.append(ModuleMutation(path, "array", values, torch.empty(0), container={}))
        return mutations

    def tensors(self) -> list[torch.Tensor]:
        """The tensors in the recorded containers, each once."""
        values = (
            x for _, _, items, _ in self._containers for x in (items.values() if isinstance(items, dict) else items)
        )
        return list({id(x): x for x in values if isinstance(x, torch.Tensor)}.values())

    def locations(self, tensors: Sequence[torch.Tensor]) -> set[StateLocation]:
        """The attributes and buffers that hold some tensors, directly or in a container."""
        ids, locations = set(map(id, tensors)), set()
        for _, _, items, owner in self._containers:
            for key, x in items.items() if isinstance(items, dict) else enumerate(items):
                if id(x) in ids and (location := _location(owner, key)) is not None:
                    locations.add(location)
        return locations

    def plain_tensors(self) -> list[torch.Tensor]:
        """The tensors that are neither parameters nor buffers."""
        contents = [items for _, _, items, owner in self._containers if owner is not None and not owner[2]]
        values = (x for items in contents for x in (items.values() if isinstance(items, dict) else items))
        tensors = {id(x): x for x in values if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter)}
        return list(tensors.values())

    def identities(self) -> set[Any]:
        """The identities of all containers and objects, and of the tensors' storages."""
        storages = {storage_of(t) for t in self.tensors() if t.numel() and not t.is_meta}
        return {id(now) for _, now, _, _ in self._containers} | {id(x) for _, x, _ in self._slotted} | storages

    def restore(self, values: bool = False) -> None:
        """Undo all changes since the snapshot was taken.

        Args:
            values: whether to undo writes into the tensors whose values were copied, too.
        """
        for _, now, before, _ in self._containers:
            _refill(now, before)
        for _, x, before in self._slotted:
            for key, value in before.items():
                object.__setattr__(x, key, value)
        for tensor in self._without_grad:
            if tensor.requires_grad and not tensor._is_view():  # a value with a gradient was written into it
                tensor.detach_()
        for _, array, content in self._arrays:
            if array.shape == content.shape:
                array[...] = content
        with torch.no_grad():
            for tensor, copied, version in self._values if values else ():
                if tensor._version != version or not torch.equal(tensor, copied):  # some kernels do not count writes
                    tensor.copy_(copied)


def storage_of(tensor: torch.Tensor) -> Any:
    """The identity of a tensor's storage; it is the same for tensors that may share memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and the like
        return id(tensor)


@contextlib.contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Restore the content of a model's modules on exit, with the values of all tensors but parameters."""
    snapshot = Snapshot(model)
    snapshot.copy_values(t for t in snapshot.tensors() if not isinstance(t, nn.Parameter))
    try:
        yield
    finally:
        snapshot.restore(values=True)


def _tracked_state(state: ModuleStateTracker) -> tuple[list[tuple[dict[str, Any], str, Any]], nn.Module]:
    """The tracked state of a model as (dict, key, value), and a module that holds only that."""
    entries = [(location.holder(state.model), location.key) for location in state.own_locations]
    values = [(holder, key, holder[key]) for holder, key in entries if key in holder]
    state_module = nn.Module()
    state_module.__dict__["state"] = [x for _, _, x in values]
    return values, state_module


@contextlib.contextmanager
def restoring_state(state: ModuleStateTracker) -> Iterator[None]:
    """Restore the tracked state of a model on exit."""
    values, state_module = _tracked_state(state)
    with restoring(state_module):
        try:
            yield
        finally:
            entries = {(id(holder), key) for holder, key, _ in values}
            for location in state.own_locations:
                if (id(holder := location.holder(state.model)), location.key) not in entries:
                    holder.pop(location.key, None)
            for holder, key, x in values:
                holder[key] = x


def _snapshot_without_state(state: ModuleStateTracker) -> Snapshot:
    """A snapshot of a model without its tracked state."""
    values, _ = _tracked_state(state)
    for holder, key, _ in values:
        holder[key] = None
    try:
        return Snapshot(state.model)
    finally:
        for holder, key, x in values:
            holder[key] = x


def shares_memory(state: ModuleStateTracker, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether some tensors share memory with anything in a model that is not tracked state."""
    return bool(tensors) and not _snapshot_without_state(state).identities().isdisjoint(map(storage_of, tensors))


def is_alone(state: ModuleStateTracker) -> bool:
    """Whether the tracked state of a model shares no memory, container or object with anything else in the model."""
    _, state_module = _tracked_state(state)
    return _snapshot_without_state(state).identities().isdisjoint(Snapshot(state_module).identities())
