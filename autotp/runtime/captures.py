"""captures: the captured graphs of one module, by call structure, and the effects that they taught."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autotp.arguments.aliasing import refuse_overlap, refuse_shared, refuse_unseen
from autotp.arguments.arguments import Arguments
from autotp.arguments.effects import Effects
from autotp.arguments.mutations import InputMutation, StateMutation
from autotp.arguments.snapshot import shares_memory
from autotp.capture.capture import capture
from autotp.capture.captured_graph import CapturedGraph, DenseShapes
from autotp.errors import CaptureError
from autotp.modules.names import dotted
from autotp.runtime.module_guards import ModuleGuards
from passes import Layout

__all__ = ["Captures"]

_MANY = 16
"""How many captures of one module are no surprise."""


def _usable(x: torch.Tensor) -> torch.Tensor:
    return x.clone() if x.is_inference() else x


class Captures:
    """The captured graphs of a module, each captured when a call of its structure first comes.

    The structure of a call is which arguments there are and which are None, the constants among them, dtypes, which
    tensors need a gradient, which dims are of size one, train or eval mode, the weights' dtypes, and plain attributes
    that have changed.

    Args:
        model: the module.
        dense: the shapes of its dense weights.
        effects: what its calls are known to mutate.
        slots: the layouts of what ranks keep shards of between calls, by slot.
        guards: of the modules that a graph depends on, the outermost first; the last are the module's own.
        root: the model around a module whose graphs must not read tensors of its own; None: the module is the model.

    Attributes:
        count: how many times the module has been captured.
        rank: the rank whose shards the module's parameters are; None while they are dense.
    """

    def __init__(
        self, model: nn.Module, dense: DenseShapes, effects: Effects, slots: Mapping[str, Layout],
        guards: Sequence[ModuleGuards], root: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.model, self.dense, self.effects, self.slots, self.guards = model, dense, effects, slots, guards
        self.root = root
        self.count = 0
        self.rank: int | None = None
        self._graphs: dict[Any, list[CapturedGraph]] = {}

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """A call's arguments, flat."""
        return self.effects.flatten(args, kwargs, self.slots, self.rank)

    def structure(self, arguments: Arguments) -> Any:
        """The key of a call.

        Raises:
            CaptureError: the content of an argument could change unseen.
            AutoTPError: the module was changed in a way that its graphs cannot follow.
        """
        if arguments.error is not None:
            raise arguments.error
        refuse_unseen(arguments.leaves)
        if self.effects.mutable:
            refuse_shared(arguments.objects)
        modules = tuple(guards.check() for guards in self.guards)
        return arguments.kinds(), arguments.spec, modules, torch.is_autocast_enabled()

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[CapturedGraph, Arguments, Any]:
        """The captured graph of a call, made now if there is none, with the call's arguments and its key.

        A capture may show an effect that was not known; then the arguments are flattened, and the call captured, again.

        Raises:
            CaptureError: the call cannot be captured.
        """
        effects = self.effects
        while True:
            arguments = self.flatten(args, kwargs)
            key = self.structure(arguments)
            if effects.learn_ints(key, args, kwargs):
                continue
            try:
                captured = self._captured(arguments, key)
            except CaptureError:
                if not effects.ints.forget():
                    raise
                continue
            if not isinstance(captured, CapturedGraph):
                if not effects.learn(captured):
                    raise captured.error()
                if isinstance(captured, StateMutation):
                    self._rebase()
            elif not effects.learn_outputs(arguments, captured):
                self.refuse_overlap(captured, arguments)
                return captured, arguments, key

    def refuse_overlap(self, captured: CapturedGraph, arguments: Arguments) -> None:
        """Raise if a call would write into a tensor that shares memory with another that it, or the module, has."""
        if self.effects.mutable:
            refuse_overlap(arguments, captured.outputs.overwritten, self.is_alone)

    def is_alone(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether tensors share no memory with what the module holds besides its known state."""
        state = self.effects.state
        return not state.locations or not shares_memory(state, tensors)

    def _rebase(self) -> None:
        for guards in self.guards:
            guards.rebase()

    def _captured(self, arguments: Arguments, key: Any) -> CapturedGraph | InputMutation | StateMutation:
        known = self._graphs.setdefault(key, [])
        for captured in known:
            if captured.fits(arguments.shapes):
                return captured
        self._warn_if_many()
        with torch.inference_mode(False):  # the graph, and its constants, will serve in training too
            args, kwargs = pytree.tree_map_only(torch.Tensor, _usable, arguments.dense())
            result = self._capture(args, kwargs)
            if isinstance(result, CapturedGraph) and (plain := self.effects.ints.plain(args, kwargs)) is not None:
                with_numbers = self._capture(*plain)
                if not isinstance(with_numbers, CapturedGraph):
                    return with_numbers
                if with_numbers.steps != result.steps:
                    raise CaptureError("forward asks what kind of number an argument is")
        if not isinstance(result, CapturedGraph):
            return result
        self.count += 1
        self._refuse_outside(result)
        known.append(result)
        self._rebase()  # what capture itself leaves behind is in the graph
        return result

    def _capture(self, args: tuple[Any, ...], kwargs: Any) -> CapturedGraph | InputMutation | StateMutation:
        return capture(self.model, args, kwargs, self.dense, effects=self.effects, slots=self.slots)

    def _warn_if_many(self) -> None:
        own = self.guards[-1]
        changed = [*(dotted(*place) for place in own.changes()), *self.effects.state.locations]
        if changed and self.count >= _MANY:
            names = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
            warnings.warn(
                f"the model is captured for the {self.count + 1}th time, because these attributes changed: {names}. "
                "A graph holds for their values: keep no floats, texts, or lists that grow, on modules",
                stacklevel=2,
            )

    def _refuse_outside(self, captured: CapturedGraph) -> None:
        """Raise if the graph of a part of a model reads a tensor that the model holds elsewhere."""
        if self.root is None or not captured.constants:
            return
        storages = _storages(self.root)
        if any(t.untyped_storage()._cdata in storages for t in captured.constants.values()):
            reason = "reads a tensor that is neither its parameter, nor its buffer, nor an input"
            raise CaptureError(f"{self.guards[-1].path} cannot be captured by itself: {reason}", reason=reason)


def _storages(model: nn.Module) -> set[Any]:
    """The storages of all tensors that a model's modules hold, in attributes of any kind."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        values = [x for v in module.__dict__.values() for x in pytree.tree_leaves(v)]
        tensors += [x for x in values if isinstance(x, torch.Tensor)]
    return {t.untyped_storage()._cdata for t in tensors}
