"""arguments: what a call is given, as flat tensors and constants, and which of it this rank holds in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autotp.arguments.boxed import ModuleState
from autotp.arguments.object_tree import Counts, Slot
from autotp.arguments.spec import flatten_call
from autotp.errors import AutoTPError
from autotp.utils.value_types import is_constant
from autotp.weights.slicing import own_part
from passes import Layout

__all__ = ["Arguments"]


class Arguments:
    """The arguments of one call.

    What an object among them keeps in a slot (:mod:`passes.planning.persistent_state`) may be whole, if the caller made
    it, or this rank's part, if a call left it there; which it is shows in its size.

    Args:
        args: the positional ones.
        kwargs: those by keyword.
        counts: the attributes of objects that calls are known to count in.
        slots: the layouts of what ranks keep in parts.
        rank: the rank that calls; None while all is whole.

    Attributes:
        leaves: tensors, and constants.
        spec: how they go together.
        objects: the objects among the arguments, which the call may change.
        tensors: the tensors among the leaves.
        shapes: their shapes in the dense model.
        error: what is wrong with them.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        counts: Counts = (),
        slots: Mapping[str, Layout] | None = None,
        rank: int | None = None,
    ) -> None:
        self.leaves, self.spec, self.objects = flatten_call(args, kwargs, counts)
        self.tensors = [x for x in self.leaves if isinstance(x, torch.Tensor)]
        self.shapes: list[Sequence[int]] = [x.shape for x in self.tensors]
        self.error: AutoTPError | None = None
        self._parts: set[int] = set()
        self._split: set[int] = set()
        if rank is None or not slots or not self.objects:
            return
        for i, slot in self.slots().items():
            layout = slots.get(slot.path) if slot.sharded else None
            if layout is not None and not layout.whole:
                self._widen(i, slot.path, layout, rank)

    def kinds(self) -> tuple[Any, ...]:
        """Per leaf, what makes another graph: dtype, device type, need of a gradient, sizes of one; a constant."""
        shapes = iter(self.shapes)
        return tuple(
            (x.dtype, x.device.type, x.requires_grad, tuple(n == 1 for n in next(shapes)))
            if isinstance(x, torch.Tensor)
            else (type(x), repr(x) if is_constant(x) else "")
            for x in self.leaves
        )

    def slots(self) -> dict[int, Slot]:
        """For each tensor that is in an object its place there."""
        numbers = self._numbers()
        return {numbers[i]: slot for i, slot in self.spec.slots.items()}

    def owners(self) -> dict[int, type]:
        """For each tensor that is in an object the class of that."""
        numbers = self._numbers()
        return {numbers[i]: cls for i, cls in self.spec.owners.items()}

    def _numbers(self) -> dict[int, int]:
        """The numbers of the tensors among the leaves."""
        return {i: n for n, i in enumerate(i for i, x in enumerate(self.leaves) if isinstance(x, torch.Tensor))}

    def _widen(self, i: int, path: str, layout: Layout, rank: int) -> None:
        ((dim, shards),) = layout.shards
        shape = self.shapes[i]
        held, whole = shards.counts[rank], shards.size
        fits = dim < len(shape) and shape[dim] in (held, whole)
        if not fits and issubclass(self.owners().get(i, object), ModuleState):  # another than was there, and whole
            return
        self._split.add(id(self.tensors[i]))
        if not fits:
            size = shape[dim] if dim < len(shape) else "nothing"
            self.error = AutoTPError(
                f"{path} has {size} along dim {dim}: it should be {held}, which this rank holds of it, or all {whole}"
            )
        elif held != whole and shape[dim] == held:
            self.shapes[i] = (*shape[:dim], whole, *shape[dim + 1 :])
            self._parts.add(id(self.tensors[i]))

    def is_part(self, x: Any) -> bool:
        """Whether a leaf is this rank's part of a value."""
        return id(x) in self._parts

    def is_split(self, x: Any) -> bool:
        """Whether ranks may hold different parts of a leaf."""
        return id(x) in self._split

    def dense(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors of the dense shapes, without values, in place of parts; objects are new ones."""
        shapes = iter(self.shapes)
        leaves = [_stand_in(x, next(shapes)) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        args, kwargs = self.spec.close(leaves)
        return args, kwargs

    def local(self, inputs: Mapping[int, Layout], rank: int) -> list[torch.Tensor]:
        """The tensors as a program takes them.

        Args:
            inputs: the layouts of those that it takes in parts, by position.
            rank: the rank whose parts.
        """
        tensors = list(self.tensors)
        for i, layout in inputs.items():
            if not self.is_part(tensors[i]):
                tensors[i] = own_part(tensors[i], layout.dims, rank)
        return tensors


def _stand_in(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if x.shape == torch.Size(shape):
        return x
    return x.new_empty((1,) * len(shape)).expand(shape).requires_grad_(x.requires_grad)
