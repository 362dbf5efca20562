"""keeping: what a forward leaves on the model's modules, which a graph would not.

A graph is a function of weights and inputs. A forward may also keep something on a module: a counter, the last hidden
state, a buffer that is another tensor from now on. Where that is so, a later call may be another function, and the
model is not captured. What is allowed is a number, flag or size that comes out the same when the next call finds it,
and changes nothing about that. Tensors that are kept are not, even if they only depend on sizes (a mask, a table of
sines): whether a later call finds them, and what it then does, a graph of the first call does not show.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autotp.hooks import HOOKS

__all__ = ["Kept", "Snapshot"]

_CONTAINERS = (list, dict, set, deque)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_NO_OBJECTS = (torch.Tensor, nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType,
               types.ModuleType, np.ndarray)  # fmt: skip
_DEEPEST = 6
_GONE = object()
"""What is where something was removed."""


@dataclass
class Kept:
    """Something that is not what it was.

    Attributes:
        name: what to call it: ``layers.0.last``.
        container: what holds it: attributes, a list, a dict, a set.
        key: under which name or key; None: the container as a whole.
        old: what it was.
        new: what it is.
    """

    name: str
    container: Any
    key: Any
    old: Any
    new: Any

    @property
    def has_tensors(self) -> bool:
        """Whether there are tensors in what is new."""
        return any(True for _ in _tensors(self.new))

    @property
    def is_another(self) -> bool:
        """Whether it is another value still where symbols of sizes are the numbers that they stand for."""
        return not _same(self.old, _numbers(self.new))

    def again(self) -> None:
        """Make the change; sizes that were symbols are numbers."""
        value = _numbers(self.new)
        if value is _GONE:
            self.container.pop(self.key, None)
        elif self.key is None:
            _fill(self.container, value)
        else:
            self.container[self.key] = value


def _tensors(x: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif depth < _DEEPEST:
        parts = x.values() if isinstance(x, dict) else x if isinstance(x, (*_CONTAINERS, tuple)) else ()
        for each in (*parts, *(_attributes(x) or {}).values()):
            yield from _tensors(each, depth + 1)


def _numbers(x: Any) -> Any:
    if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return x.node.hint
    if type(x) in (list, tuple, torch.Size):
        return type(x)([_numbers(each) for each in x])
    return {k: _numbers(each) for k, each in x.items()} if type(x) is dict else x


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


def _fill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, (tuple, list, deque)):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, dict):
        return list(old) == list(new) and all(map(_same, old.values(), new.values()))
    return isinstance(old, (*_PLAIN, set)) and (bool(old == new) or old != old)


class Snapshot:
    """What a model's modules hold, and what is in the containers and objects that they hold.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[str, Any, Any]] = []
        self._slots: list[tuple[str, Any, dict[str, Any]]] = []
        self._arrays: list[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        seen: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for kind in ("_buffers", "_parameters", "_modules"):
                self._hold(name, module.__dict__[kind], seen, _DEEPEST)
            self._held.append((name, module.__dict__, dict(module.__dict__)))
            for key, value in module.__dict__.items():
                if key not in HOOKS and key not in ("_buffers", "_parameters", "_modules"):
                    self._hold(f"{name}.{key}" if name else key, value, seen)

    def _hold(self, name: str, x: Any, seen: set[int], depth: int = 0) -> None:
        if isinstance(x, _PLAIN) or id(x) in seen:
            return
        seen.add(id(x))
        inside: list[tuple[str, Any]] = []
        if isinstance(x, np.ndarray):
            self._arrays.append((name, x, x.copy()))
        elif isinstance(x, (*_CONTAINERS, tuple)):
            if not isinstance(x, tuple):
                self._held.append((name, x, x.copy()))
            inside += [(str(k), v) for k, v in (x.items() if isinstance(x, dict) else enumerate(x))]
        if attributes := _attributes(x):
            self._held.append((name, attributes, dict(attributes)))
            inside += attributes.items()
        if slots := _slots(x):
            self._slots.append((name, x, slots))
            inside += slots.items()
        for key, value in inside if depth < _DEEPEST else ():
            self._hold(f"{name}.{key}", value, seen, depth + 1)

    def changes(self) -> list[Kept]:
        """What is not as it was."""
        found = []
        for name, now, before in self._held:
            if isinstance(now, dict):
                for key in [*before, *(k for k in now if k not in before)]:
                    old, new = before.get(key, _GONE), now.get(key, _GONE)
                    if not _same(old, new):
                        found.append(Kept(f"{name}.{key}" if name else str(key), now, key, old, new))
            elif not (now == before if isinstance(now, set) else _same(list(before), list(now))):
                found.append(Kept(name, now, None, before, now.copy()))
        for name, x, before in self._slots:
            if not _same(before, now := _slots(x)):
                found.append(Kept(name, {}, "slots", before, [now, torch.empty(0)]))  # as good as a tensor
        for name, array, was in self._arrays:
            if array.shape != was.shape or not np.array_equal(array, was):
                found.append(Kept(name, {}, "array", was, torch.empty(0)))
        return found

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are held, each once."""
        values = (x for _, _, held in self._held for x in (held.values() if isinstance(held, dict) else held))
        return list({id(x): x for x in values if isinstance(x, torch.Tensor)}.values())

    def restore(self) -> None:
        """Make it what it was."""
        for _, now, before in self._held:
            _fill(now, before)
        for _, x, before in self._slots:
            for key, value in before.items():
                object.__setattr__(x, key, value)
        for _, array, was in self._arrays:
            if array.shape == was.shape:
                array[...] = was
