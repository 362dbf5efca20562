"""partitioned_runtime: a model captured in parts runs its own Python, and its parts run their graphs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from autotp.distributed.agreement import Agreement
from autotp.distributed.process_context import ProcessContext
from autotp.modules.device import device_of
from autotp.modules.forward_patching import Guard
from autotp.partition.partition import Partition
from autotp.runtime.broadcast_inputs import broadcast_inputs
from autotp.runtime.call_agreement import CallAgreement
from autotp.runtime.eager_region import EagerRegion
from autotp.runtime.graph_runtime import GraphRuntime
from autotp.runtime.module_guards import ModuleGuards
from autotp.runtime.runtime import Runtime
from autotp.weights.registry import register
from passes import Layout

__all__ = ["PartitionedRuntime"]


class PartitionedRuntime(Runtime):
    """The runtime of a model with parts, which runs its own Python between them.

    That Python must do the same on every rank. It draws its random numbers from a stream of its own that all
    ranks share. The ranks compare the model's calls, each part's, and whether all have come to the end, so that
    one that takes another branch, or raises, is found. A part's streams start anew at each call from a number
    drawn from the shared one, so that a part that is run twice by activation checkpointing drops the same
    elements both times.

    Args:
        partition: the model and its parts, whose parameters hold this rank's shards.
        agreement: compares the ranks before each step.
        context: communicates between the ranks.
    """

    def __init__(self, partition: Partition, agreement: Agreement, context: ProcessContext) -> None:
        super().__init__(partition.model, agreement, context)
        self._layouts = partition.weight_layouts
        self._shapes = {n: p.shape for n, p, _ in self.placed()}
        self._use([GraphRuntime(p.module, p.cache, agreement, context, self) for p in partition.parts])

    def _use(self, parts: list[GraphRuntime]) -> None:
        self.parts = parts
        self.region = EagerRegion(self.model, self.own_forward, self.shards, self.context.stream(1))
        self.guards = ModuleGuards(self.model, self._shape, {p.cache.path: p.model for p in parts})
        self.call_agreement = CallAgreement(self.agreement, [self.guards], self.shards)

    @property
    def weight_layouts(self) -> Mapping[str, Layout]:
        """The split parameters' layouts, by their first names in the model."""
        return self._layouts

    def _shape(self, name: str) -> torch.Size:
        """The shape expected of a parameter; an unsplit one may have any."""
        return self._shapes[self.tied[name]] if self.shards(name) else self.model.get_parameter(name).shape

    def attach(self) -> None:
        """Let the model and its parts run this, and modules around the parts that hold shards refuse to be called."""
        for part in self.parts:
            part.attach()
        super().attach()
        inside = {id(m) for part in self.parts for m in part.model.modules()}
        for name, module in self.model.named_modules():
            if name and id(module) not in inside and any(self.shards(f"{name}.{n}") for n in module._parameters):
                module.register_forward_pre_hook(Guard(name, self.is_running))
        for part in self.parts:
            part.cache.guards.rebase()

    def is_running(self) -> bool:
        """Whether the model's own Python is running, which may not read a shard unnoticed."""
        return self.region.running

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call of the model: its own forward."""
        args, kwargs = self._agreed(args, kwargs)
        result = self.region.run(args, kwargs, self.call_agreement.end)
        self.guards.rebase_if_changed()
        return result

    def _agreed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments that all ranks call the model with."""
        for last in (False, True):
            arguments = self.arguments(args, kwargs)
            key, error = None, None
            try:
                key = arguments.kinds(), arguments.spec, self.guards.check(), torch.is_autocast_enabled()
            except Exception as caught:  # on this rank perhaps only: the others learn of it
                error = caught
            if self.call_agreement.check(None, lambda a=arguments: a, key, error, last):  # type: ignore[misc]
                break
            args, kwargs = broadcast_inputs(self.agreement, args, kwargs, device_of(self.model))
        return args, kwargs

    def restart_random(self) -> None:
        """Start the random streams of the parts anew."""
        drawn = int(torch.empty((), dtype=torch.int64).random_(1 << 62))
        # called by itself, or again in a backward: what rank 0 draws counts
        self.context.restart(drawn if self.region.running else self.mesh.gathered(drawn)[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The runtime of a copy of the model: the same ranks, shards and random streams; graphs are made anew."""
        copied = self._copied(memo)
        copied._layouts, copied._shapes = self._layouts, self._shapes
        copied._use([copy.deepcopy(part, memo) for part in self.parts])
        copied.region.stream = self.region.stream
        register(copied)
        return copied
