"""graph_runtime: one call of a parallelized module, or of a submodule by itself: guards, agreement, graph, outputs.

Users and libraries call a model's submodules (``model.get_encoder()(ids)``, as ``generate`` does). Such a
submodule has its weights as the model has split them, and its calls are captured, rewritten and compared among
the ranks as the model's are; what it returns is whole.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autotp.arguments.arguments import Arguments
from autotp.distributed.agreement import Agreement
from autotp.distributed.process_context import ProcessContext
from autotp.errors import UncapturedError
from autotp.modules.forward_patching import Guard, asked, patch_forward
from autotp.modules.names import dotted
from autotp.runtime.call_agreement import CallAgreement
from autotp.runtime.eager_region import Between, inside_of_python
from autotp.runtime.graph_cache import GraphCache
from autotp.runtime.runtime import Runtime
from autotp.weights.registry import register
from passes import Layout, Shards
from passes.ops import context

__all__ = ["GraphRuntime", "SubmoduleRuntime"]


class SubmoduleRuntime:
    """What a submodule that holds shards carries: a runtime of its own, made when it is first needed.

    Args:
        outer: the runtime of the module that it is in.
        name: its name there.
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
        """This rank's part of a call of the submodule, and its own kind of output."""
        with inside_of_python():
            return self.runtime(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SubmoduleRuntime:
        """What the submodule of a copy of the model carries."""
        outer, module = copy.deepcopy(self.outer, memo), copy.deepcopy(self.module, memo)
        if id(self) not in memo:
            copied = memo[id(self)] = SubmoduleRuntime(outer, self.name, module)
            copied.own_forward = copy.deepcopy(self.own_forward, memo)
        return memo[id(self)]


class GraphRuntime(Runtime):
    """The runtime of a module that runs as one graph a call structure: a model captured whole, or a part.

    Args:
        model: the module.
        programs: its programs, one of them made.
        agreement: how the ranks compare what they do.
        fabric: how they communicate.
    """

    broadcasts = True
    """Whether ranks may take rank 0's inputs in place of others."""

    def __init__(self, model: nn.Module, programs: GraphCache, agreement: Agreement, fabric: ProcessContext) -> None:
        super().__init__(model, agreement, fabric)
        self._take(programs)

    def _take(self, programs: GraphCache) -> None:
        self.programs = programs
        self._between: Between | None = None
        programs.rank = self.mesh.rank
        outer = programs.outer.watch if programs.outer is not None else None
        programs.comparison = CallAgreement(self.agreement, programs.watch, self.shards, outer, self.broadcasts)

    @property
    def weight_layouts(self) -> Mapping[str, Layout]:
        """The split parameters' layouts, by their first names in the module."""
        return self.programs.weight_layouts or {}

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Arguments, flat; what objects among them hold may be this rank's parts."""
        return self.programs.arguments(args, kwargs)

    def shards_of(self, name: str, tensor: torch.Tensor) -> dict[int, Shards]:
        """The split dims of a parameter, or of a tensor that the module keeps, of which this rank holds ``tensor``."""
        programs = self.programs
        return self.shards(name) or programs.memory.shards(name, programs.slots, tensor, self.mesh.rank)

    def attach(self) -> None:
        """Let the module run its programs, and its submodules that hold shards programs of their own."""
        super().attach()
        self.programs.cut_state()
        for name, module in self.model.named_modules():
            held = [f"{name}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)]
            if "_autotp" not in module.__dict__ and any(self.shards(n) for n in held):
                inside = SubmoduleRuntime(self, name, module)
                patch_forward(module, inside, inside)
                module.register_forward_pre_hook(Guard(dotted(self.programs.path, name), self.is_running))
        self.programs.watch.settle()

    def inside(self, name: str, module: nn.Module) -> GraphRuntime:
        """The runtime of a submodule that is called by itself."""
        return GraphRuntime(module, self.programs.inside(name), self.agreement, self.fabric)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """This rank's part of a call of the module, and the module's own kind of output."""
        try:
            program, of = self.programs.find(args, kwargs)
        except UncapturedError as why:
            self._between = self._between or Between(self)
            return self._between(*why.call, why)
        run = self.programs.graph(program, self.mesh.rank)
        self.before(program.random)
        inference = program.captured.outputs.inference
        with context.use(self.fabric), torch.no_grad() if inference else contextlib.nullcontext():
            tensors, seen = of.local(program.inputs, self.mesh.rank), self.programs.watch.seen
            compiled = self.programs.compiled if asked.options is None else asked.options
            results = run.execute(self.programs.lowering, tensors, seen, compiled)
            return program.unflatten(results, of.objects)

    def before(self, random: bool) -> None:
        """What to do before a program runs, which draws random numbers or not."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The runtime of a copy of the model: the same ranks, shards and random streams; graphs are made anew."""
        copied = self._copied(memo)
        copied._take(self.programs.anew(copied.model, copied.model))
        register(copied)
        return copied
