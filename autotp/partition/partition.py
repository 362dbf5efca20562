"""partition: the largest capturable parts of a model; the code between them stays ordinary Python.

Most models are captured whole, as one part. Where that fails, because the model's Python depends on the values in a
tensor, say, the model is run once and observed, and its modules are tried from the outside in: a module that can be
captured with the calls that it got is a part, and any other is descended into. A part's inputs and outputs are
replicated, so the Python between parts runs on each rank as it runs in the dense model.

That Python may read the weights of a part. A weight that it was seen to read stays unsplit. If it reads another one
later, on a branch that was not taken, that is an error at that moment.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from autotp.capture.captured_graph import DenseShapes
from autotp.capture.graph_breaks import GraphBreak, partition_text
from autotp.errors import CaptureError, PlanError
from autotp.modules.forward_patching import patch_forward, restore_forward
from autotp.modules.names import tied_names
from autotp.partition.module_calls import Call, Observed, observe
from autotp.runtime.eager_region import ParameterReads, outside_of_parts
from autotp.runtime.graph_cache import GraphCache, Scope
from passes import Layout
from passes.layouts.layout import WHOLE

__all__ = ["CapturedModule", "Partition", "cannot_run", "partition_into_modules", "partition_model"]


@dataclass(eq=False)
class CapturedModule:
    """A module that runs as rewritten graphs: a part of a model, or all of it.

    Attributes:
        path: the module's name in the model (``""``: the model itself).
        module: the module.
        cache: its graphs.
        calls: its calls in the example run.
        aliases: each parameter name in the module, mapped to the first name there of the same parameter.
        names: each such first name, mapped to the parameter's first name in the model.
    """

    path: str
    module: nn.Module
    cache: GraphCache
    calls: list[Call]
    aliases: dict[str, str]
    names: dict[str, str]


@dataclass
class Partition:
    """A model divided into captured modules and the Python between them.

    Attributes:
        model: the model.
        parts: the captured modules, in the order of the model's modules; the model itself if it is captured whole.
        graph_breaks: where capture ended, and why; none for a model captured whole.
        outside: the names of parameters that code outside of the parts reads, or that are in no part.
        idle: modules that can be captured, but in which nothing is split; they run as ordinary Python.
    """

    model: nn.Module
    parts: list[CapturedModule]
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    outside: frozenset[str] = frozenset()
    idle: list[CapturedModule] = field(default_factory=list)

    @staticmethod
    def whole(model: nn.Module, cache: GraphCache, calls: Sequence[Call] = ()) -> Partition:
        """The partition of a model that is captured whole."""
        aliases = tied_names(model)
        names = {n: n for n in aliases.values()}
        return Partition(model, [CapturedModule("", model, cache, list(calls), aliases, names)])

    @property
    def is_whole(self) -> bool:
        """Whether the model is captured whole."""
        return not self.graph_breaks

    @property
    def weight_layouts(self) -> dict[str, Layout]:
        """The split weights' layouts, by their first names in the model."""
        return {p.names[n]: layout for p in self.parts for n, layout in (p.cache.weight_layouts or {}).items()}

    @property
    def share_outside(self) -> float:
        """The fraction of the parameters that stay unsplit because of graph breaks: no part that is split has them."""
        sizes = {n: p.numel() for n, p in self.model.named_parameters()}
        idle = {n for part in self.idle for n in part.names.values()} - self.weight_layouts.keys()
        return sum(sizes[n] for n in self.outside | idle) / max(sum(sizes.values()), 1)

    def __str__(self) -> str:
        paths, outside = [p.path for p in self.parts], self.share_outside
        return partition_text(type(self.model).__name__, paths, self.graph_breaks, outside)

    def outside_of_parts(self) -> ParameterReads:
        """A mode for the Python between parts, which raises where that reads a split weight."""
        tied, weight_layouts = tied_names(self.model), {} if self.is_whole else self.weight_layouts
        return outside_of_parts(self.model, lambda name: tied.get(name, name) in weight_layouts)

    @contextlib.contextmanager
    def running(self, run: Callable[[CapturedModule, tuple[Any, ...], Mapping[str, Any]], Any]) -> Iterator[None]:
        """Replace the forwards of all parts by ``run(part, args, kwargs)`` in this context."""
        for part in self.parts:
            patch_forward(part.module, functools.partial(run, part), _Installed(part.module.__dict__.get("forward")))
        try:
            yield
        finally:
            for part in self.parts:
                restore_forward(part.module)


@dataclass
class _Installed:
    """Carried by a module whose forward is replaced: the forward that was set on the module itself, if any."""

    own_forward: Any


def partition_model(
    model: nn.Module,
    tp: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    weight_layouts: Mapping[str, Layout] | None = None,
    in_parts: bool = True,
) -> Partition:
    """Capture a model, whole or in parts, and decide how its weights are split.

    Args:
        model: the dense model. It is left as it was.
        tp: the number of ranks.
        args: positional example inputs.
        kwargs: keyword example inputs.
        weight_layouts: the weights' layouts by their first names in the model, where a plan gives them.
        in_parts: whether to look for parts of a model that cannot be captured whole.

    Raises:
        CaptureError: the model cannot be captured, and none of its parts either.
        PlanError: the plan splits a weight that must stay unsplit here.
    """
    cache = GraphCache(model, tp, DenseShapes.of(model), weight_layouts)
    try:
        cache.bind(args, kwargs)
        return Partition.whole(model, cache, [Call(args, kwargs)])
    except CaptureError as error:
        if not in_parts:
            raise
        return partition_into_modules(model, tp, args, kwargs, error, weight_layouts)


def partition_into_modules(
    model: nn.Module,
    tp: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    failed: CaptureError,
    weight_layouts: Mapping[str, Layout] | None = None,
) -> Partition:
    """The partition of a model whose capture as a whole has ``failed``; the model is run once to find its parts."""
    if any(p.is_meta for p in model.parameters()):
        raise cannot_run(failed, "it is on the meta device: give it weights") from failed
    try:
        observed = observe(model, args, kwargs)
    except Exception as error:
        raise failed from error
    partition = _Search(model, tp, observed).partition(failed)
    if not partition.parts:
        raise failed
    _shard_parts(partition, weight_layouts)
    return partition


def cannot_run(failed: CaptureError, obstacle: str) -> CaptureError:
    """The error for a model that can only be captured in parts, and that cannot be run to find them.

    Args:
        failed: why it cannot be captured whole.
        obstacle: why it cannot be run, and what to do.
    """
    message = f"{failed}\nautotp would capture it in parts, but must run it once for that, and {obstacle}"
    return CaptureError(message, place=failed.place, reason=failed.reason)


class _Search:
    """The search for parts, down the modules of a model that cannot be captured whole."""

    def __init__(self, model: nn.Module, tp: int, observed: Observed) -> None:
        self.model, self.tp, self.observed = model, tp, observed
        self.tied = tied_names(model)
        self.parts: list[CapturedModule] = []
        self.graph_breaks: list[GraphBreak] = []
        self._done: set[int] = set()

    def partition(self, failed: CaptureError) -> Partition:
        """The parts, and the graph breaks between them."""
        self.graph_breaks.append(GraphBreak("", failed.place, failed.reason))
        self._descend("", self.model)
        for part in list(self.parts):  # a module that runs only within other parts is no part of its own
            others = {id(p.module) for p in self.parts if p is not part}
            part.calls = [c for c in part.calls if not c.running & others]
            if not part.calls:
                self.parts.remove(part)
        inside = {id(part.module) for part in self.parts}
        names = {id(p): n for n, p in self.model.named_parameters()}
        touched = self.observed.touched
        outside = {n for i, n in names.items() if any(not running & inside for running in touched.get(i, ()))}
        outside |= set(names.values()) - {n for part in self.parts for n in part.names.values()}
        return Partition(self.model, self.parts, self.graph_breaks, frozenset(outside))

    def _note_break(self, path: str, error: CaptureError) -> None:
        """Record why a module is descended into; it replaces the record of a module around it with the same reason."""
        new = GraphBreak(path, error.place, error.reason)
        around = [m for m in ("", *itertools.accumulate(path.split("."), "{}.{}".format)) if m != path]
        same = [GraphBreak(m, new.place, new.reason) for m in around]
        self.graph_breaks = [b for b in self.graph_breaks if b not in same] + [new]

    def _descend(self, path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if id(child) in self._done or all(p.dim() < 2 for p in child.parameters()):
                continue
            if calls := self.observed.calls.get(id(child)):
                try:
                    self.parts.append(self._part(inner, child, calls))
                    self._done |= {id(m) for m in child.modules()}
                    continue
                except CaptureError as error:
                    self._note_break(inner, error)
            self._done.add(id(child))
            self._descend(inner, child)

    def _part(self, path: str, module: nn.Module, calls: list[Call]) -> CapturedModule:
        """A module as a part, captured for each of its calls."""
        cache = GraphCache(module, self.tp, DenseShapes.of(module), path=path, scope=Scope(self.model, False, False))
        for call in calls:
            cache.captures.capture(call.args, call.kwargs)
        aliases = tied_names(module)
        names = {n: self.tied[f"{path}.{n}"] for n in aliases.values()}
        return CapturedModule(path, module, cache, calls, aliases, names)


def _shard_parts(partition: Partition, weight_layouts: Mapping[str, Layout] | None) -> None:
    """Rewrite all parts, with one layout for each weight; parts in which nothing is split become idle."""
    refused = next((n for n in weight_layouts or {} if n in partition.outside), None)
    if refused is not None:
        raise PlanError(f"the plan splits {refused}, which code outside of the captured parts reads: plan it again")
    uses = Counter(full for part in partition.parts for full in part.names.values())
    chosen: dict[str, Layout] = dict.fromkeys(partition.outside, WHOLE)
    if weight_layouts is not None:
        chosen |= dict.fromkeys(uses, WHOLE) | dict(weight_layouts)
    for part in partition.parts:
        chosen |= _shard_part(part, chosen)
    chosen = {n: chosen.get(n, WHOLE) for n in uses if uses[n] > 1 or n in chosen}
    for part in partition.parts:  # again, where a later part has split a weight that an earlier one left unsplit
        mine = part.cache.weight_layouts or {}
        if any(chosen.get(full, WHOLE) != mine.get(n, WHOLE) for n, full in part.names.items()):
            _shard_part(part, chosen)
    split = partition.weight_layouts
    idle = [p for p in partition.parts if all(full not in split for full in p.names.values())]
    partition.parts, partition.idle = [p for p in partition.parts if p not in idle], idle


def _shard_part(part: CapturedModule, chosen: Mapping[str, Layout]) -> dict[str, Layout]:
    """Rewrite a part, with the layouts of some weights given; returns the split weights' layouts by model name."""
    part.cache.reset({n: chosen[full] for n, full in part.names.items() if full in chosen})
    for call in part.calls:
        part.cache.bind(call.args, call.kwargs)
    return {part.names[n]: layout for n, layout in (part.cache.weight_layouts or {}).items()}
