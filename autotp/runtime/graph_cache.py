"""Programs by call structure: a graph holds for one, and a new one is captured on the spot."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autotp.arguments.aliasing import refuse_overlap, refuse_shared, refuse_unseen
from autotp.arguments.arguments import Arguments
from autotp.arguments.boxed import NUMBER, box
from autotp.arguments.dynamic_ints import DynamicInts
from autotp.arguments.module_state import ModuleStateTracker
from autotp.arguments.mutations import ChangedError, KeptError
from autotp.arguments.snapshot import is_alone, shares_memory
from autotp.capture.capture import capture
from autotp.capture.captured_graph import CapturedGraph, DenseShapes
from autotp.errors import CaptureError, UncapturedError
from autotp.modules.device import device_of
from autotp.modules.names import dotted, tied_names
from autotp.program.graph_text import inputs_text
from autotp.program.rank_graph import RankGraph
from autotp.program.sharded_program import ShardedProgram, prove, shard_graph
from autotp.runtime.broadcast_inputs import Call, broadcast_inputs
from autotp.runtime.call_agreement import CallAgreement, kinds
from autotp.runtime.call_guards import CallGuards, Recognized, dynamic_sizes
from autotp.runtime.module_guards import ModuleGuards
from autotp.utils.graph_hash import graph_hash
from passes import Layout, Lowering

__all__ = ["GraphCache"]

_MANY = 16
"""How many captures of one module are no surprise."""


def _usable(x: torch.Tensor) -> torch.Tensor:
    return x.clone() if x.is_inference() else x


class GraphCache:
    """The rewritten programs of one module, by call structure.

    A structure is: which arguments there are and which are None, the constants among them, dtypes, which
    need a gradient, which dims are of size one, train or eval, the weights' dtypes, plain attributes that
    were changed. The first program decides how the weights are split; the others follow.

    Args:
        model: the module.
        tp: the number of ranks.
        dense: the shapes of its whole weights.
        weight_layouts: the weights' layouts, where they are settled.
        path: the module's name in the model (``""``: the model itself).

    Attributes:
        weight_layouts: the weights' layouts, once the first program is made.
        settled: the layouts of those weights about which the first program has no say.
        captures: how many times the module has been captured.
        rank: the rank whose shards the module's parameters are; None while they are whole.
        comparison: how the ranks compare each call; None for one process.
        slots: the layouts of what ranks keep in parts between calls, by slot.
        counts: the attributes of objects among the arguments that calls were seen to count in.
        changed: the plain arguments, by number or keyword, that calls were seen to change.
        numbers: the plain arguments that are numbers, and were seen not to be always the same.
        memory: what calls were seen to keep on the module, and modules in it.
        outer: the programs of the module that this one is in, where it is called by itself.
        proof: what becomes of a program that is not proved: True, it is an error; ``"warn"``, a warning; False,
            none is looked at.
        lowering: which passes make the programs faster.
        compiled: options for ``torch.compile``, if the programs are to be compiled.
        runs_python: whether the module's own Python may run where a call cannot be captured.
    """

    keeps_parts = True
    """Whether ranks keep their own shares of what objects hold between calls."""

    def __init__(
        self,
        model: nn.Module,
        tp: int,
        dense: DenseShapes,
        weight_layouts: Mapping[str, Layout] | None = None,
        path: str = "",
    ) -> None:
        self.model, self.tp, self.dense, self.weight_layouts, self.path = model, tp, dense, weight_layouts, path
        self.settled: Mapping[str, Layout] = {}
        self.slots: dict[str, Layout] = {}
        self.counts: set[tuple[type, str]] = set()
        self.changed: set[int | str] = set()
        self.numbers = DynamicInts()
        self.memory = ModuleStateTracker(model, path)
        self.outer: GraphCache | None = None
        self.captures = 0
        self._captured: dict[Any, list[CapturedGraph]] = {}
        self._by_structure: dict[Any, list[int]] = {}
        self._made_so_far: list[ShardedProgram] = []
        self._recognizers = CallGuards()
        self._graphs: dict[tuple[int, int], RankGraph] = {}
        self.watch = ModuleGuards(model, self.shape, path=path, kept=lambda module: self.memory.keys(module))
        self.last: ShardedProgram | None = None
        self.rank: int | None = None
        self.comparison: CallAgreement | None = None
        self.proof: bool | str = False
        self.lowering = Lowering()
        self.compiled: Mapping[str, Any] | None = None
        self.runs_python = False
        self._uncaptured: dict[Any, CaptureError] = {}

    def anew(self, model: nn.Module, root: nn.Module) -> GraphCache:
        """The programs of a copy of the module, in ``root``: the same layouts, and graphs yet to be made."""
        copy = self._made(model, root, self.dense, self.weight_layouts, "")
        copy.slots, copy.counts, copy.changed = dict(self.slots), set(self.counts), set(self.changed)
        copy.memory, copy.numbers = self.memory.copied(model), self.numbers.copied()
        return self._set_up(copy)

    def _set_up(self, made: GraphCache) -> GraphCache:
        """Other programs, which are to be proved, made fast and run as these are."""
        made.proof, made.lowering, made.compiled = self.proof, self.lowering, self.compiled
        made.runs_python = self.runs_python
        return made

    def _made(
        self,
        model: nn.Module,
        root: nn.Module,
        dense: DenseShapes,
        weight_layouts: Mapping[str, Layout] | None,
        path: str,
    ) -> GraphCache:
        """Programs of the same kind, of a module in ``root``."""
        return GraphCache(model, self.tp, dense, weight_layouts, path)

    def inside(self, name: str) -> GraphCache:
        """The programs of a submodule that is called by itself: its weights are split as they are here.

        What objects keep in parts a call of either may have left there, so both know the same of it.
        """
        module, first = self.model.get_submodule(name), tied_names(self.model)
        names = {n: f"{name}.{n}" for n in tied_names(module)}
        weight_layouts = {
            n: (self.weight_layouts or {}).get(first[names[n]]) for n in dict.fromkeys(tied_names(module).values())
        }
        dense = DenseShapes({n: self.dense.shapes[full] for n, full in names.items()})
        split = {n: layout for n, layout in weight_layouts.items() if layout is not None}
        made = self._made(module, self._root(), dense, split, dotted(self.path, name))
        made.slots, made.counts, made.outer = self.slots, self.counts, self
        made.memory = self.memory.inside(module, made.path)
        return self._set_up(made)

    def _root(self) -> nn.Module:
        """The model that the module is in, as far as its programs must know of it."""
        return self.model

    def shape(self, name: str) -> Sequence[int]:
        """The shape that a parameter has here."""
        whole = self.dense.shapes[name]
        layout = (self.weight_layouts or {}).get(name)
        return whole if self.rank is None or layout is None else layout.local_shape(whole, self.rank)

    def settle(self, settled: Mapping[str, Layout]) -> None:
        """Give the layouts of some weights, before any call or to make all programs anew."""
        self.settled, self.weight_layouts = settled, None
        self._by_structure.clear()
        self._made_so_far.clear()
        self._recognizers.clear()
        self._graphs.clear()

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """A call's arguments, flat."""
        if opened := self.changed | self.numbers.places:
            args, kwargs = box(args, kwargs, opened)
        return Arguments(args, self._with_state(kwargs), self.counts, self.slots, self.rank)

    def _with_state(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keyword arguments, and what the module keeps."""
        return {**kwargs, **self.memory.arguments()} if self.memory.places else kwargs

    def structure(self, of: Arguments) -> Any:
        """The key of a call.

        Raises:
            CaptureError: the content of an argument could change unseen.
            AutoTPError: the module was changed in a way that its graphs cannot follow.
        """
        if of.error is not None:
            raise of.error
        refuse_unseen(of.leaves)
        if self.changed or self.memory.places:
            refuse_shared(of.objects)
        around = self.outer.watch.look() if self.outer is not None else ""
        return kinds(of.leaves, of.shapes), of.spec, around, self.watch.look(), torch.is_autocast_enabled()

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CapturedGraph:
        """The captured graph of a call, made now if there is none.

        Raises:
            CaptureError: the call cannot be captured.
        """
        return self._captured_anew(args, kwargs)[0]

    def _captured_anew(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[CapturedGraph, Arguments, Any]:
        """The captured graph of a call, its arguments and its key, as what it turns out to change makes them."""
        while True:
            of = self.arguments(args, kwargs)
            key = self.structure(of)
            if self.numbers.look(key, args, kwargs):
                self.counts.add(NUMBER)
                continue
            try:
                captured = self._capture(of, key)
            except ChangedError as error:
                if error.places <= self.changed:
                    raise
                self.changed |= error.places
            except KeptError as error:
                self._keep(error)
            except CaptureError:
                if not self.numbers.forget():
                    raise
            else:
                if captured.outputs.counts <= self.counts and not (
                    self.keeps_parts and self.memory.places and self.memory.share(of, captured.graph)
                ):
                    self._refuse_overlap(captured, of)
                    return captured, of, key
                self.counts |= captured.outputs.counts  # what was taken for constant is not

    def _refuse_overlap(self, captured: CapturedGraph, of: Arguments) -> None:
        """Raise if a call would write into a tensor that shares memory with another that it, or the module, has."""
        if self.changed or self.memory.places:
            refuse_overlap(of, captured.outputs.overwritten, self._is_alone)

    def _is_alone(self, tensors: Sequence[torch.Tensor]) -> bool:
        return not self.memory.places or not shares_memory(self.memory, tensors)

    def _keep(self, error: KeptError) -> None:
        """Take into account that the module keeps something."""
        added = self.memory.add(error.places)
        if not added or not self.memory.opens() or not is_alone(self.memory):
            self.memory.forget(added)
            raise CaptureError(str(error), reason=error.reason) from error
        for watch in self._watches():
            watch.settle()

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[ShardedProgram, Arguments | Recognized]:
        """The program for a call, made now if there is none, and the call's arguments.

        Raises:
            MismatchError: the ranks call differently. All raise, and none has begun.
            CaptureError: the call cannot be captured.
            AutoTPError: the module was changed in a way that its graphs cannot follow.
        """
        taken = False
        if (known := self._recognized(args, kwargs)) is not None:
            number, given = known
            program = self._made_so_far[number]
            again = self.comparison.again if self.comparison is not None else None
            if again is None or again(number, given, program.inputs, lambda: self.arguments(args, kwargs)):
                self.last = program
                return program, given
            args, kwargs, taken = *self._taken(args, kwargs), True
        of, key, error, place = self._looked_up(args, kwargs)
        if self.comparison is None:
            if error is not None:
                raise error
        elif not self.comparison.call(key, of, error, taken, place):
            args, kwargs = self._taken(args, kwargs)
            of, key, error, place = self._looked_up(args, kwargs)
            self.comparison.call(key, of, error, True, place)
        if place is not None:
            self.last = self._made_so_far[place[0]]
            self._recognize_next(place[0], of)
            return self.last, of
        agreement = self.comparison.agreement if self.comparison is not None else None
        python = agreement is not None and self._has_python()
        if python and key in self._uncaptured:
            raise UncapturedError(self._uncaptured[key], args, kwargs)
        failed: CaptureError | None = None
        with agreement.mesh.together("capturing this call") if agreement else contextlib.nullcontext():
            try:
                captured, of, key = self._captured_anew(args, kwargs)
            except CaptureError as error:
                if not python:
                    raise
                failed = error
            else:
                program = shard_graph(captured, self.tp, self.weight_layouts, self.settled, self.slots)
                self._prove(program)
        if python and agreement is not None:
            everywhere = all(agreement.mesh.gathered(failed is not None))
            if failed is not None and everywhere:
                self._uncaptured[key] = failed
                raise UncapturedError(failed, args, kwargs) from failed
            with agreement.mesh.together("capturing this call"):
                if failed is not None:
                    raise failed
        if agreement is not None:
            meant = graph_hash(program.graph, program.captured.constants)
            agreement.check("capture", meant, lambda: {"the graph": f"{meant:x}"})
        self.weight_layouts = program.weight_layouts
        self.slots.update(program.slots)
        if self.rank is not None and self.cut_state():
            of = self.arguments(args, kwargs)
        self._by_structure.setdefault(key, []).append(len(self._made_so_far))
        self._made_so_far.append(program)
        self.last = program
        self._recognize_next(len(self._made_so_far) - 1, of)
        return program, of

    def cut_state(self) -> bool:
        """Leave of what the module keeps, and ranks keep in parts, this rank's share; whether there was more."""
        assert self.rank is not None
        with torch.inference_mode(False):
            return self.memory.cut(self.slots, self.rank)

    def _has_python(self) -> bool:
        """Whether the module's own Python may run where a call cannot be captured (see ``eager_region``)."""
        if self.memory.splits(self.slots):
            return False  # it would find shares
        inside = (m for m in self.model.modules() if m is not self.model and "_autotp" in m.__dict__)
        return self.runs_python and not torch.is_grad_enabled() and next(inside, None) is not None

    def _taken(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Rank 0's arguments."""
        assert self.comparison is not None
        return broadcast_inputs(self.comparison.agreement, args, kwargs, device_of(self.model))

    def _looked_up(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Arguments, Any, Exception | None, tuple[int, tuple[int, ...]] | None]:
        """A call's arguments, its key or the error that there is none, and its program's number and sizes, if known."""
        of = self.arguments(args, kwargs)
        key, error = self._keyed(of)
        for number in self._by_structure.get(key, ()) if error is None else ():
            captured = self._made_so_far[number].captured
            if captured.fits(of.shapes):
                try:
                    self._refuse_overlap(captured, of)
                except CaptureError as overlap:
                    return of, key, overlap, None
                return of, key, error, (number, dynamic_sizes(captured, of.shapes))
        return of, key, error, None

    def _watches(self) -> list[ModuleGuards]:
        return [self.watch] if self.outer is None else [self.outer.watch, self.watch]

    def _recognize_next(self, number: int, of: Arguments) -> None:
        """Recognise the next call of this structure by code made for it."""
        if self.rank is not None:
            program = self._made_so_far[number]
            captured, held = program.captured, program.inputs
            self._recognizers.add(number, self._watches(), of, captured, held, self.rank, self._is_alone)

    def _recognized(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, Recognized] | None:
        """The number of the program of a call that is recognised at sight, and its arguments."""
        if self.comparison is not None and self.comparison.agreement.debug:
            return None
        return self._recognizers.find(args, self._with_state(kwargs), self._watches())

    def _keyed(self, of: Arguments) -> tuple[Any, Exception | None]:
        """The key of a call, or the error that there is none."""
        try:
            return self.structure(of), None
        except Exception as error:
            return None, error

    def _capture(self, of: Arguments, key: Any) -> CapturedGraph:
        known = self._captured.setdefault(key, [])
        for captured in known:
            if captured.fits(of.shapes):
                return captured
        changed = [*(dotted(*place) for place in self.watch.changes()), *self.memory.places]
        if changed and self.captures >= _MANY:
            names = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
            warnings.warn(
                f"the model is captured for the {self.captures + 1}th time, because these attributes changed: {names}. "
                "A graph holds for their values: keep no floats, texts, or lists that grow, on modules",
                stacklevel=2,
            )
        with torch.inference_mode(False):  # the graph, and its constants, will serve in training too
            args, kwargs = of.dense()
            args, kwargs = pytree.tree_map_only(torch.Tensor, _usable, (args, kwargs))
            captured = self._traced(args, kwargs)
            if (plain := self.numbers.plain(args, kwargs)) is not None and self._traced(*plain).steps != captured.steps:
                raise CaptureError("forward asks what kind of number an argument is")
        self.captures += 1
        self._check(captured)
        known.append(captured)
        for programs in (self, self.outer):  # what capture itself leaves behind is in the graph
            if programs is not None:
                programs.watch.settle()
        return captured

    def _traced(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CapturedGraph:
        return capture(
            self.model, args, kwargs, self.dense, counts=self.counts, sharded=self.keeps_parts, layouts=self.slots,
            memory=self.memory,
        )  # fmt: skip

    def _check(self, captured: CapturedGraph) -> None:
        """Refuse a graph that would not do what the module does."""

    def prove(self, proof: bool | str) -> None:
        """Look at all programs made so far, and from now on at each that is made.

        Raises:
            ProofError: one is not proved, and ``proof`` is True.
        """
        self.proof = proof
        for program in self._made_so_far:
            self._prove(program)

    def _prove(self, program: ShardedProgram) -> None:
        if self.proof:
            prove(program, f"{type(self.model).__name__}" + (f" ({self.path})" if self.path else ""), self.proof)

    def graph(self, program: ShardedProgram, rank: int) -> RankGraph:
        """One rank's graph of a program."""
        key = (id(program), rank)
        if key not in self._graphs:
            self._graphs[key] = RankGraph(program, rank, self.model)
        return self._graphs[key]

    def place(self, program: ShardedProgram) -> str:
        """Which of the module's graphs a program is: how many there are, and what calls it is for."""
        number = next(i for i, p in enumerate(self._made_so_far, start=1) if p is program)
        which = f"graph {number} of {len(self._made_so_far)}, {self.captures} captures"
        return f"{which}; for {inputs_text(program.captured.graph, program.captured.inputs)}"
