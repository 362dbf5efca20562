"""keeping: what a forward leaves on the model's modules, which a graph would not.

A graph is a function of weights and inputs. A forward may also keep something on a module: a counter, the last hidden
state, a buffer that is another tensor from now on. Where that is so, a later call may be another function, and the
model is not captured. What is allowed is a number, flag or size that comes out the same when the next call finds it,
and changes nothing about that. Tensors that are kept are not, even if they only depend on sizes (a mask, a table of
sines): whether a later call finds them, and what it then does, a graph of the first call does not show.

What is kept then becomes an argument more (:mod:`autotp.arguments.module_state`), where it can be opened, and is not a
list that gets longer, which would make another graph of each call. Else the model is captured in parts.
"""

from __future__ import annotations

import contextlib
import types
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autotp.arguments.module_state import ModuleStateTracker
from autotp.arguments.mutations import StateLocation
from autotp.arguments.object_tree import ObjectFlattener, UnseenError
from autotp.modules.hooks import HOOKS
from autotp.utils.value_types import SCALARS

__all__ = [
    "ModuleMutation",
    "Snapshot",
    "Values",
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
_GONE = object()
"""What is where something was removed."""


@dataclass
class ModuleMutation:
    """Something that is not what it was.

    Attributes:
        name: what to call it: ``layers.0.last``.
        container: what holds it: attributes, a list, a dict, a set.
        key: under which name or key; None: the container as a whole.
        old: what it was.
        new: what it is.
        place: the attribute or buffer that it is, or is in; None if it is in none.
    """

    name: str
    container: Any
    key: Any
    old: Any
    new: Any
    location: StateLocation | None = None

    @property
    def has_tensors(self) -> bool:
        """Whether there are tensors in what is new."""
        return any(True for _ in _tensors(self.new))

    @property
    def is_another(self) -> bool:
        """Whether it is another value still where symbols of sizes are the numbers that they stand for."""
        return not _is_same(self.old, _without_symbols(self.new))

    @property
    def can_be_argument(self) -> bool:
        """Whether it can be an argument of each call."""
        grows = self.key is None and not (isinstance(self.old, list) and len(self.old) == len(self.new))
        if self.location is None or grows:
            return False
        try:
            ObjectFlattener(None).open(None if self.new is _GONE else self.new)
        except UnseenError:
            return False
        return True

    def apply(self) -> None:
        """Make the change; sizes that were symbols are numbers."""
        value = _without_symbols(self.new)
        if value is _GONE:
            self.container.pop(self.key, None)
        elif self.key is None:
            _refill(self.container, value)
        else:
            self.container[self.key] = value


def _tensors(x: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif depth < _DEEPEST:
        parts = x.values() if isinstance(x, dict) else x if isinstance(x, (*_CONTAINERS, tuple)) else ()
        for each in (*parts, *(_attributes(x) or {}).values()):
            yield from _tensors(each, depth + 1)


def _without_symbols(x: Any) -> Any:
    if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return x.node.hint
    if type(x) in (list, tuple, torch.Size):
        return type(x)([_without_symbols(each) for each in x])
    return {k: _without_symbols(each) for k, each in x.items()} if type(x) is dict else x


def _attributes(x: Any) -> dict[str, Any] | None:
    """The attributes of an object; None of what is none, or is ours."""
    if isinstance(x, _NO_OBJECTS) or type(x).__module__.partition(".")[0] == "autotp":
        return None
    found = getattr(x, "__dict__", None)
    return found if isinstance(found, dict) else None


def _slots(x: Any) -> dict[str, Any]:
    if isinstance(x, (*_NO_OBJECTS, *_PLAIN, *_CONTAINERS, tuple)):
        return {}
    names = [n for cls in type(x).__mro__ for n in _listed(vars(cls).get("__slots__", ()))]
    return {n: getattr(x, n) for n in names if n not in ("__dict__", "__weakref__") and hasattr(x, n)}


def _listed(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _is_same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, (tuple, list, deque)):
        return len(old) == len(new) and all(map(_is_same, old, new))
    if isinstance(old, dict):
        return list(old) == list(new) and all(map(_is_same, old.values(), new.values()))
    return isinstance(old, (*_PLAIN, set)) and (bool(old == new) or old != old)


_Owner = tuple[str, str | None, bool] | None
"""A module's name, its attribute (None: that is the key), and whether that is a buffer."""


def _location(where: _Owner, key: Any) -> StateLocation | None:
    if where is None:
        return None
    module, attribute, buffer = where
    return StateLocation(module, key if attribute is None else attribute, buffer, False)


class Snapshot:
    """What a model's modules hold, and what is in the containers and objects that they hold.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[str, Any, Any, _Owner]] = []
        self._slots: list[tuple[str, Any, dict[str, Any]]] = []
        self._arrays: list[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        seen: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for kind in ("_buffers", "_parameters", "_modules"):
                where = (name, None, True) if kind == "_buffers" else None
                self._hold(name, module.__dict__[kind], seen, where, _DEEPEST)
            self._held.append((name, module.__dict__, dict(module.__dict__), (name, None, False)))
            for key, value in module.__dict__.items():
                if key not in HOOKS and key not in ("_buffers", "_parameters", "_modules"):
                    self._hold(f"{name}.{key}" if name else key, value, seen, (name, key, False))
        self._without_grad = [t for t in self.tensors() if not t.requires_grad and not isinstance(t, nn.Parameter)]

    def _hold(self, name: str, x: Any, seen: set[int], where: _Owner, depth: int = 0) -> None:
        if isinstance(x, _PLAIN) or id(x) in seen:
            return
        seen.add(id(x))
        inside: list[tuple[str, Any]] = []
        if isinstance(x, np.ndarray):
            self._arrays.append((name, x, x.copy()))
        elif isinstance(x, (*_CONTAINERS, tuple)):
            if not isinstance(x, tuple):
                self._held.append((name, x, x.copy(), where))
            inside += [(str(k), v) for k, v in (x.items() if isinstance(x, dict) else enumerate(x))]
        if attributes := _attributes(x):
            self._held.append((name, attributes, dict(attributes), where))
            inside += attributes.items()
        if slots := _slots(x):
            self._slots.append((name, x, slots))
            inside += slots.items()
        for key, value in inside if depth < _DEEPEST else ():
            self._hold(f"{name}.{key}", value, seen, where, depth + 1)

    def diff(self) -> list[ModuleMutation]:
        """What is not as it was."""
        found = []
        for name, now, before, where in self._held:
            if isinstance(now, dict):
                for key in [*before, *(k for k in now if k not in before)]:
                    old, new = before.get(key, _GONE), now.get(key, _GONE)
                    if not _is_same(old, new):
                        place = _location(where, key)
                        found.append(ModuleMutation(f"{name}.{key}" if name else str(key), now, key, old, new, place))
            elif not (now == before if isinstance(now, set) else _is_same(list(before), list(now))):
                found.append(ModuleMutation(name, now, None, before, now.copy(), _location(where, None)))
        for name, x, before in self._slots:
            if not _is_same(before, now := _slots(x)):
                found.append(ModuleMutation(name, {}, "slots", before, [now, torch.empty(0)]))  # as good as a tensor
        for name, array, was in self._arrays:
            if array.shape != was.shape or not np.array_equal(array, was):
                found.append(ModuleMutation(name, {}, "array", was, torch.empty(0)))
        return found

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are held, each once."""
        values = (x for _, _, held, _ in self._held for x in (held.values() if isinstance(held, dict) else held))
        return list({id(x): x for x in values if isinstance(x, torch.Tensor)}.values())

    def locations(self, tensors: Sequence[torch.Tensor]) -> set[StateLocation]:
        """The places that some tensors are in, if they are in any."""
        wanted, found = set(map(id, tensors)), set()
        for _, _, held, where in self._held:
            for key, x in held.items() if isinstance(held, dict) else enumerate(held):
                if id(x) in wanted and (place := _location(where, key)) is not None:
                    found.add(place)
        return found

    def plain(self) -> list[torch.Tensor]:
        """The tensors that are neither parameters nor buffers."""
        holders = [held for _, _, held, where in self._held if where is not None and not where[2]]
        values = (x for held in holders for x in (held.values() if isinstance(held, dict) else held))
        found = {id(x): x for x in values if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter)}
        return list(found.values())

    def memory(self) -> set[Any]:
        """The containers and objects that are held, and the memory of tensors."""
        of_tensors = {storage_of(t) for t in self.tensors() if t.numel() and not t.is_meta}
        return {id(now) for _, now, _, _ in self._held} | {id(x) for _, x, _ in self._slots} | of_tensors

    def restore(self) -> None:
        """Make it what it was."""
        for _, now, before, _ in self._held:
            _refill(now, before)
        for _, x, before in self._slots:
            for key, value in before.items():
                object.__setattr__(x, key, value)
        for tensor in self._without_grad:
            if tensor.requires_grad and not tensor._is_view():  # it was written with what needs a gradient
                tensor.detach_()
        for _, array, was in self._arrays:
            if array.shape == was.shape:
                array[...] = was


def storage_of(tensor: torch.Tensor) -> Any:
    """What is the same for tensors that may share memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and the like
        return id(tensor)


class Values:
    """The values of some tensors.

    Args:
        tensors: the tensors.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._were = [(t, t.detach().clone(), t._version) for t in tensors]

    def written(self) -> list[torch.Tensor]:
        """Those that were written into, as far as torch counts that."""
        return [t for t, _, version in self._were if t._version != version]

    def restore(self) -> None:
        """Make them what they were."""
        with torch.no_grad():
            for tensor, was, version in self._were:
                if tensor._version != version or not torch.equal(tensor, was):  # some kernels do not count
                    tensor.copy_(was)


@contextlib.contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """The model with its buffers, and what its modules hold, as they were."""
    snapshot = Snapshot(model)
    values = Values([t for t in snapshot.tensors() if not isinstance(t, nn.Parameter)])
    try:
        yield
    finally:
        snapshot.restore()
        values.restore()


def _tracked_state(memory: ModuleStateTracker) -> tuple[list[tuple[dict[str, Any], str, Any]], nn.Module]:
    """What is in known places, with what has it under which key; and a module that holds all of it, and no more."""
    places = [(place.holder(memory.model), place.key) for place in memory.own]
    values = [(holder, key, holder[key]) for holder, key in places if key in holder]
    by_itself = nn.Module()
    by_itself.__dict__["kept"] = [x for _, _, x in values]
    return values, by_itself


@contextlib.contextmanager
def restoring_state(memory: ModuleStateTracker) -> Iterator[None]:
    """The model with what it keeps in known places as it was."""
    values, by_itself = _tracked_state(memory)
    with restoring(by_itself):
        try:
            yield
        finally:
            there = {(id(holder), key) for holder, key, _ in values}
            for place in memory.own:
                if (id(holder := place.holder(memory.model)), place.key) not in there:
                    holder.pop(place.key, None)
            for holder, key, x in values:
                holder[key] = x


def _snapshot_without_state(memory: ModuleStateTracker) -> Snapshot:
    """What a model holds elsewhere than in known places."""
    values, _ = _tracked_state(memory)
    for holder, key, _ in values:
        holder[key] = None
    try:
        return Snapshot(memory.model)
    finally:
        for holder, key, x in values:
            holder[key] = x


def shares_memory(memory: ModuleStateTracker, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether some tensors share memory with something that a model holds elsewhere than in known places."""
    return bool(tensors) and not _snapshot_without_state(memory).memory().isdisjoint(map(storage_of, tensors))


def is_alone(memory: ModuleStateTracker) -> bool:
    """Whether what a model keeps in known places shares no memory, container or object with what else it holds."""
    _, by_itself = _tracked_state(memory)
    return _snapshot_without_state(memory).memory().isdisjoint(Snapshot(by_itself).memory())
