"""graph_cache: the compiled graphs of one module, by call structure.

A graph holds for one structure of calls; a call of another structure is captured on the spot. The cache knows no ranks:
:mod:`autotp.runtime.graph_runtime` lets the ranks agree on what is done with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotp.arguments.arguments import Arguments
from autotp.arguments.effects import Effects
from autotp.arguments.module_state import ModuleStateTracker
from autotp.capture.captured_graph import DenseShapes
from autotp.modules.names import dotted, tied_names
from autotp.options import Options
from autotp.program.graph_text import inputs_text
from autotp.program.rank_graph import RankGraph
from autotp.program.sharded_program import ShardedProgram, prove, shard_graph
from autotp.runtime.bound_call import BoundCall, CacheEntry
from autotp.runtime.call_guards import CallGuards, dynamic_sizes
from autotp.runtime.captures import Captures
from autotp.runtime.module_guards import ModuleGuards
from passes import Layout

__all__ = ["Compiled", "GraphCache", "Scope"]


@dataclass(frozen=True)
class Scope:
    """Where a captured module stands in the user's model.

    Attributes:
        root: the model around a part that is captured by itself; None: the module is the model, or is within it.
        keeps_shards: whether ranks may keep their own shards of the tensors in objects and in state.
        broadcasts: whether ranks whose inputs differ may take rank 0's.
    """

    root: nn.Module | None = None
    keeps_shards: bool = True
    broadcasts: bool = True


@dataclass(frozen=True)
class Compiled:
    """A graph that was made for a call, and is not in the cache yet."""

    program: ShardedProgram
    arguments: Arguments
    key: Any
    call: tuple[tuple[Any, ...], Mapping[str, Any]]


class GraphCache:
    """The compiled graphs of a module.

    The first graph decides how the weights are split; the others follow.

    Args:
        model: the module.
        tp: the number of ranks.
        dense: the shapes of its dense weights.
        weight_layouts: the weights' layouts, where they are fixed.
        path: the module's name in the model (``""``: the model itself).
        scope: where the module stands in the model.
        outer: the cache of the module around a submodule that is called by itself.

    Attributes:
        weight_layouts: the weights' layouts, once the first graph is made.
        fixed: the layouts of those weights about which the first graph has no say.
        slots: the layouts of what ranks keep shards of between calls, by slot.
        options: how graphs are proved, lowered and compiled.
        captures: the captured graphs.
        call_guards: the guards generated for calls that came before.
        guards: of the module.
        last: the program that was used last.
    """

    def __init__(
        self, model: nn.Module, tp: int, dense: DenseShapes, weight_layouts: Mapping[str, Layout] | None = None,
        path: str = "", scope: Scope | None = None, outer: GraphCache | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tp, self.weight_layouts, self.path = model, tp, weight_layouts, path
        self.scope, self.outer = scope or Scope(), outer
        self.fixed: Mapping[str, Layout] = {}
        self.slots: dict[str, Layout] = {} if outer is None else outer.slots
        self.options: Options = Options() if outer is None else outer.options
        self.last: ShardedProgram | None = None
        if outer is None:
            effects = Effects(ModuleStateTracker(model, path), self.scope.keeps_shards)
        else:
            effects = outer.captures.effects.inside(model, path)
        self.guards = ModuleGuards(model, self.shape, path=path, state_names=self._state_names)
        every = [self.guards] if outer is None else [outer.guards, self.guards]
        self.captures: Captures = Captures(model, dense, effects, self.slots, every, self.scope.root)
        self._entries: list[CacheEntry] = []
        self._by_structure: dict[Any, list[CacheEntry]] = {}
        self.call_guards = CallGuards(every)
        self._graphs: dict[tuple[int, int], RankGraph] = {}

    def copied(self, model: nn.Module, root: nn.Module) -> GraphCache:
        """The cache of a copy of the module, in ``root``: the same layouts, and graphs yet to be made."""
        scope = self.scope if self.scope.root is None else Scope(root, self.scope.keeps_shards, self.scope.broadcasts)
        copy = GraphCache(model, self.tp, self.captures.dense, self.weight_layouts, self.path, scope)
        copy.slots.update(self.slots)
        copy.captures.effects = self.captures.effects.copied(model)
        copy.options = self.options
        copy.guards.known = self.captures.dense.shapes
        return copy

    def inside(self, name: str) -> GraphCache:
        """The cache of a submodule that is called by itself: its weights are split as they are here.

        Objects and state may hold shards that a call of either has left there, so both know the same of them.
        """
        module, first = self.model.get_submodule(name), tied_names(self.model)
        names = {n: f"{name}.{n}" for n in tied_names(module)}
        known = self.weight_layouts or {}
        layouts = {n: known.get(first[names[n]]) for n in dict.fromkeys(tied_names(module).values())}
        dense = DenseShapes({n: self.captures.dense.shapes[full] for n, full in names.items()})
        split = {n: layout for n, layout in layouts.items() if layout is not None}
        return GraphCache(module, self.tp, dense, split, dotted(self.path, name), self.scope, self)

    def _state_names(self, module: str) -> frozenset[str]:
        return self.state.keys(module)

    @property
    def state(self) -> ModuleStateTracker:
        """The state that the module keeps between calls, as far as it is known."""
        return self.captures.effects.state

    def shape(self, name: str) -> Sequence[int]:
        """The shape that a parameter has here."""
        whole, rank = self.captures.dense.shapes[name], self.captures.rank
        layout = (self.weight_layouts or {}).get(name)
        return whole if rank is None or layout is None else layout.local_shape(whole, rank)

    def reset(self, fixed: Mapping[str, Layout]) -> None:
        """Forget all graphs and layouts but those ``fixed``; captures stay."""
        self.fixed, self.weight_layouts = fixed, None
        self._by_structure.clear()
        self._entries.clear()
        self.call_guards.clear()
        self._graphs.clear()

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BoundCall:
        """A call bound to its graph, which is made now if there is none; for one process.

        Raises:
            CaptureError: the call cannot be captured.
            AutoTPError: the module was changed in a way that its graphs cannot follow.
        """
        arguments = self.captures.flatten(args, kwargs)
        call = self.lookup(arguments, self.captures.structure(arguments))
        return call if call is not None else self.add(self.compile(args, kwargs))

    def lookup(self, arguments: Arguments, key: Any) -> BoundCall | None:
        """A call bound by its structure; None if there is no graph for it.

        Raises:
            CaptureError: the call would write into memory that two of its tensors share.
        """
        for entry in self._by_structure.get(key, ()):
            if entry.program.captured.fits(arguments.shapes):
                self.captures.refuse_overlap(entry.program.captured, arguments)
                return self._bound(entry, arguments)
        return None

    def compile(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Compiled:
        """Capture a call, rewrite its graph for all ranks, and prove it.

        Raises:
            CaptureError: the call cannot be captured.
            ProofError: the graph is not proved.
        """
        captured, arguments, key = self.captures.capture(args, kwargs)
        program = shard_graph(captured, self.tp, self.weight_layouts, self.fixed, self.slots)
        self._prove(program)
        return Compiled(program, arguments, key, (args, kwargs))

    def add(self, compiled: Compiled) -> BoundCall:
        """Take a graph into the cache; the call that it was made for, bound to it."""
        program, arguments = compiled.program, compiled.arguments
        self.weight_layouts = program.weight_layouts
        self.slots.update(program.slots)
        if self.captures.rank is not None and self.shard_state():
            arguments = self.captures.flatten(*compiled.call)
        entry = CacheEntry(len(self._entries), program)
        self._by_structure.setdefault(compiled.key, []).append(entry)
        self._entries.append(entry)
        return self._bound(entry, arguments)

    def _bound(self, entry: CacheEntry, arguments: Arguments) -> BoundCall:
        program, rank = entry.program, self.captures.rank
        self.last = program
        if rank is not None:
            entry.graph = self.graph(program, rank)
            self.call_guards.add(entry, arguments, rank, self.captures.is_alone)
        tensors, sizes = arguments.tensors, dynamic_sizes(program.captured, arguments.shapes)
        dense = (
            {i: x for i, x in program.inputs.items() if not arguments.is_part(tensors[i])} if rank is not None else {}
        )
        return BoundCall(entry, tensors, arguments.objects, sizes, dense)

    def shard_state(self) -> bool:
        """Replace dense state of which ranks keep shards by this rank's shard; whether there was any."""
        assert self.captures.rank is not None
        with torch.inference_mode(False):
            return self.state.shard(self.slots, self.captures.rank)

    def prove(self) -> None:
        """Prove all graphs made so far, as the options ask for.

        Raises:
            ProofError: one is not proved, and that is an error.
        """
        for entry in self._entries:
            self._prove(entry.program)

    def _prove(self, program: ShardedProgram) -> None:
        if check := self.options.check:
            prove(program, f"{type(self.model).__name__}" + (f" ({self.path})" if self.path else ""), check)

    def graph(self, program: ShardedProgram, rank: int) -> RankGraph:
        """One rank's graph of a program."""
        key = (id(program), rank)
        if key not in self._graphs:
            self._graphs[key] = RankGraph(program, rank, self.model)
        return self._graphs[key]

    def describe(self, program: ShardedProgram) -> str:
        """Which of the module's graphs a program is: how many there are, and the calls it is for."""
        number = next(e.number for e in self._entries if e.program is program)
        which = f"graph {number + 1} of {len(self._entries)}, {self.captures.count} captures"
        return f"{which}; for {inputs_text(program.captured.graph, program.captured.inputs)}"
