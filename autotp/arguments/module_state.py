"""module_state: state that modules keep from one call to the next, as additional arguments of each call.

A graph is a function of weights and inputs. A model may be more than that: it writes keys and values into a buffer of
its own, or puts its last state on a module. Such state becomes an object among the arguments. A call reads and mutates
the object as it does a cache that it is passed (:mod:`autotp.arguments.object_tree`), and a value that is set in the
object is set on the module too. A capture shows which attributes and buffers these are
(:mod:`autotp.arguments.snapshot`).

Ranks keep shards, as of a parameter, of those tensors that the model itself reads again: buffers and attributes that
are written in place, and those that a captured call was seen to read. A tensor that a forward only puts on a module is
replicated, since it is for others to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from autotp.arguments.arguments import Arguments
from autotp.arguments.boxed import ModuleState
from autotp.arguments.mutations import StateLocation
from autotp.arguments.object_tree import ObjectFlattener, UnseenError, sharded_state
from autotp.weights.slicing import local_part
from passes import Layout, Shards

__all__ = ["ModuleStateTracker"]


@sharded_state
class ShardedModuleState(ModuleState):
    """Module state that each rank keeps its own shards of."""


class _LiveState(dict[str, Any]):
    """Module state by name; a value that is set or deleted here is set or deleted on the module too."""

    def __init__(self, holders: Mapping[str, tuple[dict[str, Any], str]]) -> None:
        super().__init__({name: holder[key] for name, (holder, key) in holders.items() if key in holder})
        self._holders = holders

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        holder, key = self._holders[name]
        holder[key] = value

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        holder, key = self._holders[name]
        del holder[key]


def _is_within(path: str, name: str) -> bool:
    """Whether the path of a slot is a location's name, or leads into the value at that location."""
    return path == name or path.startswith((f"{name}.", f"{name}["))


_SHARDED, _REPLICATED = "module state that is sharded", "module state, replicated"
_KEYWORDS: dict[str, type[ModuleState]] = {_SHARDED: ShardedModuleState, _REPLICATED: ModuleState}
"""The keywords that state is passed by: no model has parameters of these names."""


def _state_class(location: StateLocation) -> type[ModuleState]:
    return ShardedModuleState if location.sharded else ModuleState


@dataclass(frozen=True)
class _Index:
    """Tables that are derived from the known locations.

    Attributes:
        locations: the known locations, by name in the model.
        own: the locations in the tracker's module, relative to it, each with its location in the model.
        keys: the names of the tracked attributes and buffers, by module.
        holders: by the keyword of a state object and the name in the model, the dict that holds the value, and its key.
    """

    locations: dict[str, StateLocation]
    own: dict[StateLocation, StateLocation]
    keys: dict[str, frozenset[str]]
    holders: dict[str, dict[str, tuple[dict[str, Any], str]]]


class ModuleStateTracker:
    """The attributes and buffers in which a model keeps state from one call to the next, as far as they are known.

    Args:
        model: the model, or a module in it.
        path: the module's name in the model.
        locations: the known locations in the model, by name; trackers of its modules share this dict and add to it.
    """

    def __init__(self, model: nn.Module, path: str = "", locations: dict[str, StateLocation] | None = None) -> None:
        self.model, self.path = model, path
        self.locations: dict[str, StateLocation] = {} if locations is None else locations
        self._index: _Index | None = None

    def inside(self, module: nn.Module, path: str) -> ModuleStateTracker:
        """The tracker of a module in the model; both share the known locations."""
        return ModuleStateTracker(module, path, self.locations)

    def copied(self, model: nn.Module) -> ModuleStateTracker:
        """The tracker of a copy of the model."""
        return ModuleStateTracker(model, self.path, dict(self.locations))

    def add(self, locations: Iterable[StateLocation]) -> set[StateLocation]:
        """Track locations in this module; returns those that were not known, as locations in the model."""
        prefix = f"{self.path}." if self.path else ""
        full = (StateLocation((prefix + p.module).rstrip("."), p.key, p.buffer, p.sharded) for p in locations)
        added = {p for p in full if p.name not in self.locations}
        self.locations.update({p.name: p for p in added})
        return added

    def forget(self, locations: Iterable[StateLocation]) -> None:
        """No longer track these locations in the model."""
        for location in locations:
            del self.locations[location.name]

    def learn_reads(self, arguments: Arguments, graph: fx.Graph) -> bool:
        """Let ranks keep shards of the state that a call reads; returns whether any of it was replicated until now.

        Args:
            arguments: the call's arguments.
            graph: the graph that was captured of the call.
        """
        inputs, owners, read = graph.find_nodes(op="placeholder"), arguments.owners(), set[str]()
        for i, slot in arguments.slots().items():
            if owners[i] is ModuleState and not slot.count and any(user.op != "output" for user in inputs[i].users):
                read |= {name for name in self.locations if _is_within(slot.path, name)}
        self.locations.update({name: replace(self.locations[name], sharded=True) for name in read})
        return bool(read)

    def is_visible(self) -> bool:
        """Whether autotp can see into all tracked state."""
        try:
            for state in self.arguments().values():
                ObjectFlattener().flatten(state)
        except UnseenError:
            return False
        return True

    @property
    def own_locations(self) -> dict[StateLocation, StateLocation]:
        """The locations in this module, in order, relative to it; each with its location in the model."""
        return self._updated_index().own

    def _updated_index(self) -> _Index:
        """The tables for the locations that are known now."""
        if self._index is None or self._index.locations != self.locations:
            own: dict[StateLocation, StateLocation] = {}
            for _, location in sorted(self.locations.items()):
                if not self.path or location.module == self.path or location.module.startswith(f"{self.path}."):
                    module = location.module.removeprefix(self.path).removeprefix(".") if self.path else location.module
                    own[StateLocation(module, location.key, location.buffer, location.sharded)] = location
            keys: dict[str, frozenset[str]] = {}
            holders: dict[str, dict[str, tuple[dict[str, Any], str]]] = {}
            for location, full in own.items():
                keys[location.module] = keys.get(location.module, frozenset()) | {location.key}
                by_name = holders.setdefault(_SHARDED if location.sharded else _REPLICATED, {})
                by_name[full.name] = location.holder(self.model), location.key
            self._index = _Index(dict(self.locations), own, keys, holders)
        return self._index

    def keys(self, module: str) -> frozenset[str]:
        """The names of the tracked attributes and buffers of a module."""
        return self._updated_index().keys.get(module, frozenset())

    def knows(self, holder: Any, key: Any) -> bool:
        """Whether an entry of a dict is tracked state; the dict is compared by identity."""
        return any(p.key == key and p.holder(self.model) is holder for p in self.own_locations)

    def arguments(self) -> dict[str, ModuleState]:
        """The state objects that each call is passed, by keyword."""
        states: dict[str, ModuleState] = {}
        for keyword, holders in self._updated_index().holders.items():
            state = states[keyword] = _KEYWORDS[keyword]()
            state.__dict__ = _LiveState(holders)
        return states

    def to_modules(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[ModuleState]]:
        """Set the modules' state from the state objects among keyword arguments.

        Returns:
            The other keyword arguments, and the state objects.
        """
        states = [kwargs[k] for k in _KEYWORDS if k in kwargs]
        values = {name: x for state in states for name, x in state.__dict__.items()}
        for location, full in self.own_locations.items() if states else ():
            holder = location.holder(self.model)
            if full.name in values:
                holder[location.key] = values[full.name]
            else:
                holder.pop(location.key, None)
        return {k: x for k, x in kwargs.items() if k not in _KEYWORDS}, states

    def from_modules(self, states: list[ModuleState]) -> None:
        """Set the content of state objects from the modules' state."""
        for state in states:
            state.__dict__.clear()
            for location, full in self.own_locations.items():
                holder = location.holder(self.model)
                if _state_class(location) is type(state) and location.key in holder:
                    state.__dict__[full.name] = holder[location.key]

    def shards(self, name: str, layouts: Mapping[str, Layout], tensor: torch.Tensor, rank: int) -> dict[int, Shards]:
        """The sharded dims of a state tensor, if it is a rank's shard; empty if it has its full size.

        Args:
            name: the tensor's name in this module.
            layouts: the layouts of slots, by path.
            tensor: the tensor.
            rank: the rank.
        """
        layout = layouts.get(f"{self.path}.{name}" if self.path else name)
        if layout is None or layout.whole or not any(_is_within(name, p.name) for p in self.own_locations if p.sharded):
            return {}
        is_shard = all(d < tensor.dim() and tensor.shape[d] == s.counts[rank] for d, s in layout.shards)
        return layout.dims if is_shard else {}

    def shard(self, layouts: Mapping[str, Layout], rank: int) -> bool:
        """Replace state tensors of full size by this rank's shards; returns whether there were any."""
        any_full = False
        for location, full in self.own_locations.items():
            holder, layout = location.holder(self.model), layouts.get(full.name) if location.sharded else None
            tensor = holder.get(location.key)
            if layout is None or not isinstance(tensor, torch.Tensor) or tensor.requires_grad:
                continue  # a tensor through which gradients flow is sharded inside each call
            if any(d < tensor.dim() and tensor.shape[d] == s.size != s.counts[rank] for d, s in layout.shards):
                holder[location.key] = local_part(tensor.detach(), layout.dims, rank).clone()
                any_full = True
        return any_full

    def has_shards(self, layouts: Mapping[str, Layout]) -> bool:
        """Whether ranks keep shards of any state."""
        names = [full.name for location, full in self.own_locations.items() if location.sharded]
        return any(not x.whole and any(_is_within(path, n) for n in names) for path, x in layouts.items())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors in tracked state, by path in the model.

        Raises:
            UnseenError: the state has since come to hold something that autotp cannot see into.
        """
        tensors: dict[str, torch.Tensor] = {}
        for state in self.arguments().values():
            flattener = ObjectFlattener()
            flattener.flatten(state)
            tensors |= {
                p: x for p, x in zip(flattener.paths, flattener.leaves, strict=True) if isinstance(x, torch.Tensor)
            }
        return tensors
