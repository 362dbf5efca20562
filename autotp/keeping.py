"""keeping: what a forward leaves on the model's modules, which a graph would not.

A graph is a function of weights and inputs. A forward may also keep something on a module: a counter, the last hidden
state, a buffer that is another tensor from now on. What it keeps because a size has not been met before (a mask, a
table of sines) comes out the same when it is made anew in each call, and so does a flag that is set once and changes
nothing. All else makes the model more than a function, and it is not captured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from autotp.hooks import HOOKS
from passes.graphs import is_random, op_name

__all__ = ["Change", "Snapshot", "tensors_in", "unlike_a_function"]

_CONTAINERS = (list, dict, set, deque)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_DEEPEST = 4
_SIZES = {"aten.sym_size", "aten.sym_numel", "aten.sym_stride", "aten.sym_storage_offset", "aten.size",
          "aten.zeros_like", "aten.ones_like", "aten.empty_like", "aten.full_like", "aten.new_zeros", "aten.new_ones",
          "aten.new_empty", "aten.new_full"}  # fmt: skip
"""What reads no values of its first operand."""


@dataclass
class Change:
    """Something in a container is not what it was.

    Attributes:
        name: what to call it: ``layers.0.last``.
        container: what holds it: attributes, a list, a dict, a set.
        key: under which name, number or key; None: the container as a whole.
        old: what it was.
        new: what it is.
    """

    name: str
    container: Any
    key: Any
    old: Any
    new: Any

    def tensors(self) -> list[torch.Tensor]:
        """The tensors in what is new."""
        return list(tensors_in(self.new))

    @property
    def is_one(self) -> bool:
        """Whether it is one still where symbols of sizes are the numbers that they stand for."""
        return not _same(self.old, _numbers(self.new))

    def again(self) -> None:
        """Make the change; sizes that were symbols are numbers."""
        _put(self.container, self.key, _numbers(self.new))


def tensors_in(x: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors in containers and objects."""
    if isinstance(x, torch.Tensor):
        yield x
    elif depth < _DEEPEST and isinstance(x, (*_CONTAINERS, tuple)):
        for each in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(each, depth + 1)
    elif depth < _DEEPEST and _is_object(x):
        yield from tensors_in(vars(x), depth + 1)


def _numbers(x: Any) -> Any:
    if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return x.node.hint
    if type(x) in (list, tuple, torch.Size):
        return type(x)([_numbers(each) for each in x])
    return {k: _numbers(each) for k, each in x.items()} if type(x) is dict else x


def _is_object(x: Any) -> bool:
    return hasattr(x, "__dict__") and not isinstance(x, (torch.Tensor, nn.Module, type)) and not callable(x)


_GONE = object()
"""What is where something was removed."""


def _put(container: Any, key: Any, value: Any) -> None:
    if value is _GONE:
        container.pop(key, None)
    elif key is None:
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(value)
    else:
        container[key] = value


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    return type(old) is type(new) and isinstance(old, (*_PLAIN, tuple, torch.Size)) and _equal(old, new)


def _equal(old: Any, new: Any) -> bool:
    return _alike(old, new) if isinstance(old, tuple) else bool(old == new) or old != old


def _alike(old: Any, new: Any) -> bool:
    return len(old) == len(new) and all(map(_same, old, new))


class Snapshot:
    """What a model's modules hold, and what is in the containers and objects that they hold.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[str, Any, Any]] = []
        seen: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for kind in ("_buffers", "_parameters", "_modules"):
                self._hold(name, module.__dict__[kind], seen, _DEEPEST)
            own = {k: v for k, v in module.__dict__.items() if k not in HOOKS and k not in module.__dict__["_modules"]}
            self._held.append((name, module.__dict__, dict(module.__dict__)))
            for key, value in own.items():
                if key not in ("_buffers", "_parameters", "_modules", "_autotp", "forward"):
                    self._hold(f"{name}.{key}" if name else key, value, seen)

    def _hold(self, name: str, x: Any, seen: set[int], depth: int = 0) -> None:
        if _is_object(x):
            x = vars(x)
        if not isinstance(x, _CONTAINERS) or id(x) in seen:
            return
        seen.add(id(x))
        self._held.append((name, x, x.copy()))
        if depth < _DEEPEST and not isinstance(x, set):
            for key, value in x.items() if isinstance(x, dict) else enumerate(x):
                self._hold(f"{name}.{key}", value, seen, depth + 1)

    def changes(self) -> list[Change]:
        """What is not as it was."""
        found = []
        for name, now, before in self._held:
            if isinstance(now, dict):
                for key in [*before, *(k for k in now if k not in before)]:
                    old, new = before.get(key, _GONE), now.get(key, _GONE)
                    if not _same(old, new):
                        found.append(Change(f"{name}.{key}" if name else str(key), now, key, old, new))
            elif now != before if isinstance(now, set) else not _alike(before, now):
                found.append(Change(name, now, None, before, now.copy()))
        return found

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are held, each once."""
        values = (x for _, _, held in self._held for x in (held.values() if isinstance(held, dict) else held))
        return list({id(x): x for x in values if isinstance(x, torch.Tensor)}.values())

    def restore(self) -> None:
        """Make it what it was."""
        for _, now, before in self._held:
            now.clear()
            (now.extend if isinstance(now, (list, deque)) else now.update)(before)


def unlike_a_function(graph: fx.Graph, kept: Mapping[str, list[int]], places: Collection[str]) -> str | None:
    """The name of something kept that comes of the values of inputs or parameters, or of what was kept before.

    Args:
        graph: a captured graph, whose parameters and buffers are ``get_attr`` nodes.
        kept: for each thing that is kept the results that are in it.
        places: the ``get_attr`` targets that count as such values.
    """
    results = graph.output_node().args[0]
    for name, numbers in kept.items():
        pending, seen = [results[i] for i in numbers if isinstance(results[i], fx.Node)], set[fx.Node]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder" or is_random(node) or (node.op == "get_attr" and str(node.target) in places):
                return name
            operands = node.all_input_nodes
            pending += operands[1:] if op_name(node) in _SIZES else operands
    return None
