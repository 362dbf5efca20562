"""remembered: what modules keep from one call to the next, as arguments more of each call.

A graph is a function of weights and inputs. A model may be more than that: it writes keys and values into a buffer of
its own, or puts its last state on a module. What it keeps in this way becomes an object among the arguments, which a
call reads and changes as it does a cache that it is passed (:mod:`autotp.arguments.object_tree`); what is put into the
object is put where the modules have it. Which places these are shows when a call is captured
(:mod:`autotp.arguments.snapshot`).

Of tensors that the model itself reads again each rank keeps its own share, as of a parameter: what is written in
place, and what a captured call was seen to read. What a forward only puts on a module is whole: it is for others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from autotp.arguments.boxed import ModuleState
from autotp.arguments.mutations import StateLocation
from autotp.arguments.object_tree import ObjectFlattener, UnseenError, sharded_state
from autotp.weights.slicing import local_part
from passes import Layout, Shards

if TYPE_CHECKING:
    from autotp.arguments.arguments import Arguments

__all__ = ["ModuleStateTracker"]


@sharded_state
class ShardedModuleState(ModuleState):
    """What ranks keep their own shares of."""


class _LiveState(dict[str, Any]):
    """What is in some places, by name: what is set here is set there."""

    def __init__(self, holders: Mapping[str, tuple[dict[str, Any], str]]) -> None:
        super().__init__({name: held[key] for name, (held, key) in holders.items() if key in held})
        self._holders = holders

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        held, key = self._holders[name]
        held[key] = value

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        held, key = self._holders[name]
        del held[key]


def _is_within(path: str, name: str) -> bool:
    """Whether a slot is a place, or is in what is there."""
    return path == name or path.startswith((f"{name}.", f"{name}["))


_SHARED, _WHOLE = "what ranks keep shares of", "what ranks keep whole"
_KEYWORDS: dict[str, type[ModuleState]] = {_SHARED: ShardedModuleState, _WHOLE: ModuleState}
"""What no argument of a model's is called."""


def _class_of(place: StateLocation) -> type[ModuleState]:
    return ShardedModuleState if place.sharded else ModuleState


@dataclass(frozen=True)
class _Index:
    """What follows from which places are known.

    Attributes:
        places: these.
        own: those in the module, as they are called in it and as they are called in the model.
        keys: the names of what is kept, by module.
        holders: what has it under which key, by its name in the model, and by the keyword of the object.
    """

    places: dict[str, StateLocation]
    own: dict[StateLocation, StateLocation]
    keys: dict[str, frozenset[str]]
    holders: dict[str, dict[str, tuple[dict[str, Any], str]]]


class ModuleStateTracker:
    """The places in which a model keeps something from one call to the next, as far as they are known.

    Args:
        model: the model, or a module in it.
        path: the module's name in the model.
        places: the places in the model, by name, which those who share them may add to.
    """

    def __init__(self, model: nn.Module, path: str = "", places: dict[str, StateLocation] | None = None) -> None:
        self.model, self.path = model, path
        self.places: dict[str, StateLocation] = {} if places is None else places
        self._known: _Index | None = None

    def inside(self, module: nn.Module, path: str) -> ModuleStateTracker:
        """The memory of a module in the model, of which both know the same."""
        return ModuleStateTracker(module, path, self.places)

    def copied(self, model: nn.Module) -> ModuleStateTracker:
        """The memory of a copy of the model."""
        return ModuleStateTracker(model, self.path, dict(self.places))

    def add(self, places: Iterable[StateLocation]) -> set[StateLocation]:
        """Take some places of this module's into account; those that were not known."""
        prefix = f"{self.path}." if self.path else ""
        full = (StateLocation((prefix + p.module).rstrip("."), p.key, p.buffer, p.sharded) for p in places)
        added = {p for p in full if p.name not in self.places}
        self.places.update({p.name: p for p in added})
        return added

    def forget(self, places: Iterable[StateLocation]) -> None:
        """Take some places out again."""
        for place in places:
            del self.places[place.name]

    def share(self, of: Arguments, graph: fx.Graph) -> bool:
        """Let ranks keep their own shares of what a call reads; whether it reads something that was whole.

        Args:
            of: the call's arguments.
            graph: what was captured of it.
        """
        inputs, owners, read = graph.find_nodes(op="placeholder"), of.owners(), set[str]()
        for i, slot in of.slots().items():
            if owners[i] is ModuleState and not slot.count and any(user.op != "output" for user in inputs[i].users):
                read |= {name for name in self.places if _is_within(slot.path, name)}
        self.places.update({name: replace(self.places[name], sharded=True) for name in read})
        return bool(read)

    def opens(self) -> bool:
        """Whether autotp can see into all that is kept."""
        try:
            for each in self.arguments().values():
                ObjectFlattener().open(each)
        except UnseenError:
            return False
        return True

    @property
    def own(self) -> dict[StateLocation, StateLocation]:
        """The places in this module, in order, as they are called in it and as they are called in the model."""
        return self._look().own

    def _look(self) -> _Index:
        """What follows from which places are known."""
        if self._known is None or self._known.places != self.places:
            own: dict[StateLocation, StateLocation] = {}
            for _, place in sorted(self.places.items()):
                if not self.path or place.module == self.path or place.module.startswith(f"{self.path}."):
                    local = place.module.removeprefix(self.path).removeprefix(".") if self.path else place.module
                    own[StateLocation(local, place.key, place.buffer, place.sharded)] = place
            keys: dict[str, frozenset[str]] = {}
            holders: dict[str, dict[str, tuple[dict[str, Any], str]]] = {}
            for place, full in own.items():
                keys[place.module] = keys.get(place.module, frozenset()) | {place.key}
                held = holders.setdefault(_SHARED if place.sharded else _WHOLE, {})
                held[full.name] = place.holder(self.model), place.key
            self._known = _Index(dict(self.places), own, keys, holders)
        return self._known

    def keys(self, module: str) -> frozenset[str]:
        """The names of what is kept on a module of these."""
        return self._look().keys.get(module, frozenset())

    def knows(self, holder: Any, key: Any) -> bool:
        """Whether what is under a key of this very dict is in a place that is known."""
        return any(place.key == key and place.holder(self.model) is holder for place in self.own)

    def arguments(self) -> dict[str, ModuleState]:
        """The objects that a call is given, by the keywords that it is given them by."""
        found: dict[str, ModuleState] = {}
        for keyword, holders in self._look().holders.items():
            made = found[keyword] = _KEYWORDS[keyword]()
            made.__dict__ = _LiveState(holders)
        return found

    def put(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[ModuleState]]:
        """Put what is in such objects on the modules; the other keyword arguments, and the objects."""
        kept = [kwargs[k] for k in _KEYWORDS if k in kwargs]
        values = {name: x for each in kept for name, x in each.__dict__.items()}
        for place, full in self.own.items() if kept else ():
            holder = place.holder(self.model)
            if full.name in values:
                holder[place.key] = values[full.name]
            else:
                holder.pop(place.key, None)
        return {k: x for k, x in kwargs.items() if k not in _KEYWORDS}, kept

    def take(self, kept: list[ModuleState]) -> None:
        """Put what is on the modules into such objects."""
        for each in kept:
            each.__dict__.clear()
            for place, full in self.own.items():
                holder = place.holder(self.model)
                if _class_of(place) is type(each) and place.key in holder:
                    each.__dict__[full.name] = holder[place.key]

    def shards(self, name: str, layouts: Mapping[str, Layout], tensor: torch.Tensor, rank: int) -> dict[int, Shards]:
        """The split dims of a tensor that is kept, of which a rank holds its share; none of one that it holds whole.

        Args:
            name: its place in this module.
            layouts: those of slots.
            tensor: what is there.
            rank: the rank.
        """
        layout = layouts.get(f"{self.path}.{name}" if self.path else name)
        if layout is None or layout.whole or not any(_is_within(name, p.name) for p in self.own if p.sharded):
            return {}
        held = all(d < tensor.dim() and tensor.shape[d] == s.counts[rank] for d, s in layout.shards)
        return layout.dims if held else {}

    def cut(self, layouts: Mapping[str, Layout], rank: int) -> bool:
        """Leave of whole tensors that ranks keep in parts this rank's share; whether there were any."""
        found = False
        for place, full in self.own.items():
            holder, layout = place.holder(self.model), layouts.get(full.name) if place.sharded else None
            tensor = holder.get(place.key)
            if layout is None or not isinstance(tensor, torch.Tensor) or tensor.requires_grad:
                continue  # where gradients flow, calls take their shares of it
            if any(d < tensor.dim() and tensor.shape[d] == s.size != s.counts[rank] for d, s in layout.shards):
                holder[place.key] = local_part(tensor.detach(), layout.dims, rank).clone()
                found = True
        return found

    def splits(self, layouts: Mapping[str, Layout]) -> bool:
        """Whether ranks keep their own shares of anything."""
        names = [full.name for place, full in self.own.items() if place.sharded]
        return any(not x.whole and any(_is_within(path, n) for n in names) for path, x in layouts.items())

    def kept(self) -> dict[str, torch.Tensor]:
        """The tensors that are kept, by place in the model.

        Raises:
            UnseenError: something was put beside them since, into which autotp cannot see.
        """
        found: dict[str, torch.Tensor] = {}
        for each in self.arguments().values():
            opener = ObjectFlattener()
            opener.open(each)
            found |= {p: x for p, x in zip(opener.paths, opener.leaves, strict=True) if isinstance(x, torch.Tensor)}
        return found
