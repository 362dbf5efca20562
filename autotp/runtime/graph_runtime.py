"""graph_runtime: one call of a parallelized module, or of a submodule by itself: guards, agreement, graph, outputs.

A call is bound to its graph by guards, else by its structure, else by a new capture; the ranks agree on each step; the
graph runs; outputs are built and mutations applied. Where the call cannot be captured, the module's own Python runs.

Users and libraries call submodules, too (``model.get_encoder()(ids)``, as ``generate`` does). A submodule has its
weights split as the model's are, its calls take the same way, and its results are replicated.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autotp.arguments.arguments import Arguments
from autotp.distributed.agreement import Agreement
from autotp.distributed.process_context import ProcessContext
from autotp.errors import AutoTPError, CaptureError, PartialCaptureWarning
from autotp.modules.device import device_of
from autotp.modules.forward_patching import Guard, asked, patch_forward
from autotp.modules.names import dotted
from autotp.runtime.bound_call import BoundCall
from autotp.runtime.broadcast_inputs import broadcast_inputs
from autotp.runtime.call_agreement import CallAgreement
from autotp.runtime.eager_region import EagerRegion, within_graph
from autotp.runtime.graph_cache import Compiled, GraphCache
from autotp.runtime.runtime import Runtime
from autotp.utils.graph_hash import graph_hash
from autotp.weights.registry import register
from passes import Layout, Shards
from passes.ops.context import use_context

__all__ = ["GraphRuntime", "SubmoduleRuntime", "runtime_of"]


class SubmoduleRuntime:
    """The runtime of a submodule that holds shards, made at its first call by itself.

    Args:
        outer: the runtime of the module around it.
        name: the submodule's name in that module.
        module: the submodule.

    Attributes:
        own_forward: the forward that was set on the submodule itself.
    """

    def __init__(self, outer: GraphRuntime, name: str, module: nn.Module) -> None:
        self.outer, self.name, self.module = outer, name, module
        self.own_forward = module.__dict__.get("forward")
        self._runtime: GraphRuntime | None = None

    @property
    def runtime(self) -> GraphRuntime:
        """The submodule's runtime."""
        if self._runtime is None:
            self._runtime = self.outer.inside(self.name, self.module)
        return self._runtime

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the submodule by itself."""
        with within_graph():
            return self.runtime(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SubmoduleRuntime:
        """The runtime of the same submodule of a copy of the model."""
        outer, module = copy.deepcopy(self.outer, memo), copy.deepcopy(self.module, memo)
        if id(self) not in memo:
            copied = memo[id(self)] = SubmoduleRuntime(outer, self.name, module)
            copied.own_forward = copy.deepcopy(self.own_forward, memo)
        return memo[id(self)]


class GraphRuntime(Runtime):
    """The runtime of a module that runs as one graph a call structure: a model captured whole, or a part of one.

    Args:
        model: the module.
        cache: its graphs, one of them made.
        agreement: how the ranks compare what they do.
        context: how they communicate.
        owner: the runtime of the model of which the module is a part; None: the module is the model.
    """

    def __init__(
        self, model: nn.Module, cache: GraphCache, agreement: Agreement, context: ProcessContext,
        owner: Runtime | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, agreement, context)
        self.owner = owner
        self._use(cache)

    def _use(self, cache: GraphCache) -> None:
        self.cache = cache
        cache.captures.rank = self.mesh.rank
        self.call_agreement = CallAgreement(self.agreement, cache.captures.guards, self.shards, cache.scope.broadcasts)
        self._region: EagerRegion | None = None
        self._uncaptured: dict[Any, CaptureError] = {}

    @property
    def weight_layouts(self) -> Mapping[str, Layout]:
        """The split parameters' layouts, by their first names in the module."""
        return self.cache.weight_layouts or {}

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Arguments, flat; objects among them may hold this rank's shards."""
        return self.cache.captures.flatten(args, kwargs)

    def shards_of(self, name: str, tensor: torch.Tensor) -> dict[int, Shards]:
        """The split dims of a parameter, or of state that the module keeps, of which this rank holds ``tensor``."""
        return self.shards(name) or self.cache.state.shards(name, self.cache.slots, tensor, self.mesh.rank)

    def attach(self) -> None:
        """Let the module run its graphs, and its submodules that hold shards graphs of their own."""
        super().attach()
        self.cache.shard_state()
        for name, module in self.model.named_modules():
            parameters = [f"{name}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)]
            if "_autotp" not in module.__dict__ and any(self.shards(n) for n in parameters):
                inside = SubmoduleRuntime(self, name, module)
                patch_forward(module, inside, inside)
                module.register_forward_pre_hook(Guard(dotted(self.cache.path, name), self.is_running))
        self.cache.guards.rebase()

    def inside(self, name: str, module: nn.Module) -> GraphRuntime:
        """The runtime of a submodule that is called by itself."""
        return GraphRuntime(module, self.cache.inside(name), self.agreement, self.context, self.owner)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the module: this rank computes its part, and the result is what the module itself returns."""
        if self.owner is None:
            return self._called(args, kwargs)
        with within_graph():
            return self._called(args, kwargs)

    def _called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        call, effects = None, self.cache.captures.effects
        if not self.agreement.debug:
            call = self.cache.call_guards.match(args, effects.with_state(kwargs) if effects.state.locations else kwargs)
        if call is None or not self.call_agreement.check(call, lambda: self.arguments(args, kwargs)):
            args, kwargs, call, key = self._looked_up(args, kwargs, call is not None)
            if call is None:
                call, error = self._compiled(args, kwargs, key)
                if error is not None:
                    return self._eagerly(args, kwargs, error)
        assert call is not None
        return self._run(call)

    def _run(self, call: BoundCall) -> Any:
        """The graph's outputs; what the call mutates is mutated."""
        program, graph = call.entry.program, call.entry.graph
        assert graph is not None
        self.cache.last = program
        if program.random and self.owner is not None:
            self.owner.restart_random()
        options, inference = self.cache.options, program.captured.outputs.inference
        compiled = options.compile if asked.options is None else asked.options
        with use_context(self.context), torch.no_grad() if inference else contextlib.nullcontext():
            tensors = call.local(self.mesh.rank) if call.unsharded else call.tensors
            results = graph.execute(options.lowering, tensors, self.cache.guards.seen, compiled)
            return program.rebuild_outputs(results, call.objects)

    def _looked_up(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], differed: bool
    ) -> tuple[tuple[Any, ...], Mapping[str, Any], BoundCall | None, Any]:
        """The arguments that all ranks call with, the call bound to its graph, if there is one, and its key.

        Args:
            args: this rank's positional arguments.
            kwargs: its arguments by keyword.
            differed: whether the ranks' inputs were found to differ, so that rank 0's are to be taken.
        """
        last = differed
        while True:
            if last:
                args, kwargs = broadcast_inputs(self.agreement, args, kwargs, device_of(self.model))
            arguments = self.arguments(args, kwargs)
            key = call = error = None
            try:
                key = self.cache.captures.structure(arguments)
                call = self.cache.lookup(arguments, key)
            except Exception as caught:  # on this rank perhaps only: the others learn of it
                error = caught
            if self.call_agreement.check(call, lambda a=arguments: a, key, error, last):  # type: ignore[misc]
                return args, kwargs, call, key
            last = True

    def _compiled(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], key: Any
    ) -> tuple[BoundCall | None, CaptureError | None]:
        """A call bound to a new graph; or the error of all ranks, where the module's own Python may run instead."""
        doing, error = "capturing this call", self._uncaptured.get(key)
        compiled: Compiled | None = None
        if not self._may_run_eagerly():
            with self.mesh.together(doing):
                compiled = self.cache.compile(args, kwargs)
        elif error is None:
            compiled, error = self.mesh.attempt(doing, lambda: self.cache.compile(args, kwargs))
        if compiled is None:
            assert error is not None
            self._uncaptured[key] = error
            return None, error
        fingerprint = graph_hash(compiled.program.graph, compiled.program.captured.constants)
        self.agreement.check("capture", fingerprint, lambda: {"the graph": f"{fingerprint:x}"})
        return self.cache.add(compiled), None

    def _may_run_eagerly(self) -> bool:
        """Whether the module's own Python may run a call that cannot be captured.

        Gradients must be off: recomputation of a forward in the backward would draw other random numbers. Every shard
        must be in a submodule that runs as a graph: the module's Python would read it as if it were dense.
        """
        if torch.is_grad_enabled() or self.cache.options.strict or self.cache.state.has_shards(self.cache.slots):
            return False
        return any("_autotp" in m.__dict__ for m in self.model.modules() if m is not self.model)

    def _eagerly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], reason: CaptureError) -> Any:
        """A call of the module's own Python, whose submodules run as graphs of their own."""
        if self._region is None:
            name = self.cache.path or f"this {type(self.model).__name__}"
            warnings.warn(
                f"a call of {name} cannot be captured{f' ({reason.place})' if reason.place else ''}: {reason.reason}. "
                "Its own Python runs, on replicated values, and its submodules run as graphs of their own",
                PartialCaptureWarning,
                stacklevel=2,
            )
            self._region = EagerRegion(self.model, self.own_forward, self.shards, self.context.stream(1))
        result = self._region.run(args, kwargs, self.call_agreement.end)
        self.cache.guards.rebase_if_changed()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The runtime of a copy of the model: the same ranks, shards and random streams; graphs are made anew."""
        owner = copy.deepcopy(self.owner, memo)
        if owner is not None:
            copy.deepcopy(self.model, memo)
        if id(self) not in memo:
            copied = self._copied(memo)
            copied.owner = owner
            copied._use(self.cache.copied(copied.model, (owner or copied).model))
            if owner is None:
                register(copied)
        return memo[id(self)]


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a parallelized model, or of a submodule of one.

    Raises:
        AutoTPError: the model is not parallelized.
    """
    runtime = model.__dict__.get("_autotp")
    if isinstance(runtime, SubmoduleRuntime):
        return runtime.runtime
    if not isinstance(runtime, Runtime):
        raise AutoTPError(
            f"this {type(model).__name__} is not parallelized: call autotp.parallelize(model, tp=...) first"
        )
    return runtime
