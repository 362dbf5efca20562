"""aliasing: refuse a call that mutates an argument which shares memory, or an object, with another argument."""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from autotp.arguments.arguments import Arguments
from autotp.arguments.boxed import Boxed, ModuleState
from autotp.errors import CaptureError
from autotp.utils.value_types import is_constant

__all__ = ["are_distinct", "overlapping", "refuse_overlap", "refuse_shared", "refuse_unseen"]


def refuse_unseen(leaves: Sequence[Any]) -> None:
    """Raise if autotp cannot see into one of the leaves: its content could change between calls unnoticed."""
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) and not is_constant(leaf):
            leaf = leaf.it if isinstance(leaf, Boxed) else leaf
            description = f"a {type(leaf).__module__}.{type(leaf).__qualname__}"
            raise CaptureError(
                f"an argument is, or holds, {description}, whose content autotp cannot see: pass tensors, numbers and "
                "strings, in tuples, lists and dicts, or register the class with "
                "torch.utils._pytree.register_pytree_node",
                reason=f"called with {description}, whose content pytree cannot see",
            )


def refuse_shared(objects: Sequence[Any]) -> None:
    """Raise if two of the objects that a call may mutate are, or hold, the same list or object."""
    if not are_distinct(objects):
        raise CaptureError(
            "two arguments are, or hold, the same list or object, and the call mutates an argument: a graph would "
            "change only one of the two (state that the model keeps on its modules is an argument too). Pass copies",
            reason="two arguments are the same object, and the call mutates an argument",
        )


def refuse_overlap(
    arguments: Arguments, written: Collection[int], is_alone: Callable[[Sequence[torch.Tensor]], bool]
) -> None:
    """Raise if a call would write into a tensor that shares memory with another argument, or with the module.

    Args:
        arguments: the call's arguments.
        written: the positions of the tensors that the call writes into.
        is_alone: whether tensors share no memory with anything else that the module holds.
    """
    if not written:
        return
    named = zip(arguments.spec.paths(), arguments.leaves, strict=True)
    paths = [path for path, x in named if isinstance(x, torch.Tensor)]
    if (pair := overlapping(arguments.tensors, written)) is not None:
        overlap = f"{paths[pair[0]]} and {paths[pair[1]]} share memory"
    elif not is_alone([arguments.tensors[i] for i in written]):
        overlap = (
            f"one of {', '.join(paths[i] for i in sorted(written))} shares memory with another tensor on the model"
        )
    else:
        return
    raise CaptureError(
        f"{overlap}, and the call writes into one of them: a graph would change only that one. Give each its own",
        reason="tensors that share memory, and the call writes into one of them",
    )


def are_distinct(objects: Sequence[Any]) -> bool:
    """Whether no list, dict or object is reachable twice from boxed arguments and the state of modules.

    Tensors do not count: :func:`overlapping` compares their memory. Nor do tuples, which cannot change.
    """
    ids: list[int] = []

    def visit(value: Any) -> None:
        content = value if isinstance(value, (list, tuple, dict)) else getattr(value, "__dict__", ())
        if isinstance(value, (torch.Tensor, enum.Enum)) or callable(value):
            return
        ids.extend([] if isinstance(value, tuple) or content == () else [id(value)])
        for item in content.values() if isinstance(content, dict) else content:
            visit(item)

    for argument in objects:
        if isinstance(argument, (Boxed, ModuleState)):
            visit(argument)
    return len(set(ids)) == len(ids)


def overlapping(tensors: Sequence[torch.Tensor], written: Collection[int]) -> tuple[int, int] | None:
    """The positions of two tensors that share an element in memory, if the call writes into one; None if none do.

    A graph that changes one of the two would not change the other.
    """
    by_storage: dict[int, list[int]] = {}
    for i, x in enumerate(tensors):
        if x.numel() and x.device.type != "meta" and 0 not in x.stride():
            by_storage.setdefault(x.untyped_storage().data_ptr(), []).append(i)
    for positions in by_storage.values():
        for i, j in itertools.combinations(positions, 2):
            if (i in written or j in written) and _overlap(_extent(tensors[i]), _extent(tensors[j])):
                return i, j
    return None


def _extent(x: torch.Tensor) -> Any:
    """The memory of a tensor in its storage: first byte, bytes per element, shape and strides."""
    return x.storage_offset() * x.element_size(), x.element_size(), tuple(x.shape), tuple(x.stride())


@functools.lru_cache(maxsize=1024)
def _overlap(one: Any, other: Any) -> bool:
    """Whether two extents in the same storage have an element in common."""
    (first, size, shape, strides), (second, width, _, _) = one, other

    def end(extent: Any) -> int:
        offset, itemsize, shape, strides = extent
        return int(offset + itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))))

    if end(one) <= second or end(other) <= first:
        return False
    if size != width or (first - second) % size:  # elements do not line up: taken for an overlap
        return True
    start, elements = min(first, second), torch.zeros((max(end(one), end(other)) - min(first, second)) // size)
    elements.as_strided(shape, strides, (first - start) // size).fill_(1)  # marks the elements of one
    return bool(elements.as_strided(other[2], other[3], (second - start) // size).any())
