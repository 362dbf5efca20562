"""arguments: a call's arguments as flat tensors and constants, and which of the tensors are this rank's shards."""

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

    A tensor in a slot that ranks keep shards of (:mod:`passes.planning.persistent_state`) has its full size if the
    caller made it, and is this rank's shard if an earlier call left it there. Its size tells which of the two it is.

    Args:
        args: the positional arguments.
        kwargs: the keyword arguments.
        counts: the attributes of objects that calls are known to count in.
        slots: the layouts of the slots that ranks keep shards of, by path.
        rank: the rank that calls; None while nothing is sharded.

    Attributes:
        leaves: the tensors and constants of all arguments.
        spec: the structure that the leaves were taken from.
        objects: the objects among the arguments, which the call may change.
        tensors: the tensors among the leaves.
        shapes: the tensors' shapes in the dense model.
        error: the error to raise where a tensor has a size that it should not have; None if all fit.
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
        self._shards: set[int] = set()
        self._sharded: set[int] = set()
        if rank is None or not slots or not self.objects:
            return
        for i, slot in self.slots().items():
            layout = slots.get(slot.path) if slot.sharded else None
            if layout is not None and not layout.whole:
                self._set_dense_shape(i, slot.path, layout, rank)

    def kinds(self) -> tuple[Any, ...]:
        """The properties of each leaf for which a graph is made anew.

        Of a tensor these are dtype, device type, whether it requires a gradient, and which sizes are one; of a
        constant, its type and text.
        """
        shapes = iter(self.shapes)
        return tuple(
            (x.dtype, x.device.type, x.requires_grad, tuple(n == 1 for n in next(shapes)))
            if isinstance(x, torch.Tensor)
            else (type(x), repr(x) if is_constant(x) else "")
            for x in self.leaves
        )

    def slots(self) -> dict[int, Slot]:
        """The slot of each tensor that is in an object, by the tensor's position."""
        positions = self._tensor_positions()
        return {positions[i]: slot for i, slot in self.spec.slots.items()}

    def owners(self) -> dict[int, type]:
        """The object's class for each tensor that is in an object, by the tensor's position."""
        positions = self._tensor_positions()
        return {positions[i]: cls for i, cls in self.spec.owners.items()}

    def _tensor_positions(self) -> dict[int, int]:
        """The position among the tensors, by the position among the leaves."""
        return {i: n for n, i in enumerate(i for i, x in enumerate(self.leaves) if isinstance(x, torch.Tensor))}

    def _set_dense_shape(self, i: int, path: str, layout: Layout, rank: int) -> None:
        """Record whether the tensor in a sharded slot is this rank's shard, and its dense shape if it is one."""
        ((dim, shards),) = layout.shards
        shape = self.shapes[i]
        shard_size, full_size = shards.counts[rank], shards.size
        fits = dim < len(shape) and shape[dim] in (shard_size, full_size)
        if not fits and issubclass(self.owners().get(i, object), ModuleState):  # the module put a new tensor there
            return
        self._sharded.add(id(self.tensors[i]))
        if not fits:
            size = shape[dim] if dim < len(shape) else "nothing"
            self.error = AutoTPError(
                f"{path} has {size} along dim {dim}: it should have {shard_size}, as this rank's shard, or the full "
                f"{full_size}"
            )
        elif shard_size != full_size and shape[dim] == shard_size:
            self.shapes[i] = (*shape[:dim], full_size, *shape[dim + 1 :])
            self._shards.add(id(self.tensors[i]))

    def is_part(self, x: Any) -> bool:
        """Whether a leaf is this rank's shard of a tensor."""
        return id(x) in self._shards

    def is_split(self, x: Any) -> bool:
        """Whether ranks may hold different shards of a leaf."""
        return id(x) in self._sharded

    def dense(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The args and kwargs of the dense model: new objects, and for shards tensors of the dense shape, no values."""
        shapes = iter(self.shapes)
        leaves = [_stand_in(x, next(shapes)) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        args, kwargs = self.spec.unflatten(leaves)
        return args, kwargs

    def local(self, inputs: Mapping[int, Layout], rank: int) -> list[torch.Tensor]:
        """The tensors that a rank's program takes.

        Args:
            inputs: the layouts of the inputs that the program takes shards of, by position.
            rank: the rank.
        """
        tensors = list(self.tensors)
        for i, layout in inputs.items():
            if not self.is_part(tensors[i]):
                tensors[i] = own_part(tensors[i], layout.dims, rank)
        return tensors


def _stand_in(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor like this one, of another shape, that takes no memory; the tensor itself if it has the shape."""
    if x.shape == torch.Size(shape):
        return x
    return x.new_empty((1,) * len(shape)).expand(shape).requires_grad_(x.requires_grad)
