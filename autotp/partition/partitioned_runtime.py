"""divided: a model that could not be captured whole runs its own Python, and its parts their programs."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autotp.arguments.arguments import Arguments
from autotp.distributed.agreement import Agreement
from autotp.distributed.process_context import ProcessContext
from autotp.modules.device import device_of
from autotp.modules.forward_patching import DeferredError, Guard
from autotp.partition.partition import Partition
from autotp.runtime.broadcast_inputs import broadcast_inputs
from autotp.runtime.call_agreement import CallAgreement, kinds
from autotp.runtime.eager_region import ParameterReads, outside_of_parts
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
        division: the model and its parts, whose parameters hold this rank's share.
        agreement: how the ranks compare what they do.
        seed: the seed of random numbers, the same on all ranks.
        fabric: how the parts communicate.
    """

    def __init__(self, division: Partition, agreement: Agreement, seed: int, fabric: ProcessContext) -> None:
        super().__init__(division.model, agreement, fabric)
        self._stored = division.weight_layouts
        self.between = ProcessContext(
            self.mesh, seed + 1 + self.mesh.tp, agreement.missing, fabric.timeout, fabric.shared_memory
        )
        self.devices = {torch.device("cpu"), device_of(self.model)}
        self._shapes = {n: p.shape for n, p, _ in self.placed()}
        self._take([_Part(self, p.module, p.programs, agreement, fabric) for p in division.parts])

    def _take(self, parts: list[_Part]) -> None:
        self.parts, self.running = parts, False
        self.touches = ParameterReads((), lambda *_: None)
        self._raised: Exception | None = None
        self.watch = ModuleGuards(self.model, self._shape, {p.programs.path: p.model for p in parts})
        self.comparison = CallAgreement(self.agreement, self.watch, self.shards)

    @property
    def weight_layouts(self) -> Mapping[str, Layout]:
        """The split parameters' layouts, by their first names in the model."""
        return self._stored

    def _shape(self, name: str) -> torch.Size:
        """The shape that a parameter must have here: of those that are not split, any."""
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
            part.programs.watch.settle()

    def is_running(self) -> bool:
        """Whether the model's own Python is running, which may not read a shard unnoticed."""
        return self.running

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call of the model: its own forward."""
        args, kwargs = self._compared(args, kwargs)
        before = self.running, self.touches
        self.running, self.touches = True, outside_of_parts(self.model, self.shards)
        result, held = None, DeferredError(lambda error: _stems(error, self._raised))  # or they wait for no word of it
        try:
            with held, contextlib.ExitStack() as around:
                for device in self.devices:
                    around.enter_context(self.between.random(True, device))
                around.enter_context(self.touches)
                result = self._own()(*args, **kwargs)
        finally:
            (self.running, self.touches), self._raised = before, None
        self.comparison.end(result, held.error)
        self.watch.follow()
        return result

    def _own(self) -> Any:
        """The model's own forward."""
        return self.own_forward or types.MethodType(type(self.model).forward, self.model)

    def _compared(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments that all ranks call the model with."""
        of = self.arguments(args, kwargs)
        key, error = self._keyed(of)
        if not self.comparison.call(key, of, error):
            args, kwargs = broadcast_inputs(self.agreement, args, kwargs, device_of(self.model))
            of = self.arguments(args, kwargs)
            key, error = self._keyed(of)
            self.comparison.call(key, of, error, last=True)
        return args, kwargs

    def _keyed(self, of: Arguments) -> tuple[Any, Exception | None]:
        try:
            return (kinds(of.leaves, of.shapes), of.spec, self.watch.look(), torch.is_autocast_enabled()), None
        except Exception as error:
            return None, error

    def run(self, part: _Part, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a part."""
        touches = self.touches
        suspended, touches.suspended = touches.suspended, True
        try:
            return part.run(args, kwargs)
        except Exception as raised:
            self._raised = raised if self.running else None
            raise
        finally:
            touches.suspended = suspended

    def restart(self) -> None:
        """Start the parts' streams of random numbers anew."""
        drawn = int(torch.empty((), dtype=torch.int64).random_(1 << 62))
        # called by itself, or again in a backward: what rank 0 draws counts
        self.fabric.restart(drawn if self.running else self.mesh.gathered(drawn)[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The runtime of a copy of the model: the same ranks, shards and random streams; graphs are made anew."""
        copied = self._copied(memo)
        copied._stored, copied.between = self._stored, self.between
        copied.devices, copied._shapes = self.devices, self._shapes
        copied._take([copy.deepcopy(part, memo) for part in self.parts])
        register(copied)
        return copied


class _Part(GraphRuntime):
    """The runtime of a part."""

    broadcasts = False  # what Python between parts makes of rank 0's inputs is the same everywhere, or a mistake

    def __init__(self, divided: PartitionedRuntime, *args: Any) -> None:
        self.divided = divided
        super().__init__(*args)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """This rank's part of a call of the part."""
        return self.divided.run(self, args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """:class:`GraphRuntime`'s call."""
        return super().__call__(args, kwargs)

    def inside(self, name: str, module: nn.Module) -> GraphRuntime:
        """The runtime of a submodule that is called by itself."""
        return _Part(self.divided, module, self.programs.inside(name), self.agreement, self.fabric)

    def before(self, random: bool) -> None:
        """Start the streams of random numbers anew if the program draws some."""
        if random:
            self.divided.restart()

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The part of the copy of the model."""
        divided = copy.deepcopy(self.divided, memo)
        copy.deepcopy(self.model, memo)
        if id(self) not in memo:
            copied = self._copied(memo)
            copied.divided = divided
            copied._take(self.programs.anew(copied.model, divided.model))
        return memo[id(self)]


def _stems(error: BaseException | None, origin: Exception | None) -> bool:
    """Whether an error is another one, or was raised because of it."""
    while error is not None and origin is not None:
        if error is origin:
            return True
        error = error.__cause__ or error.__context__
    return False
