"""aliasing: arguments that share memory or objects, refused where a call mutates one."""

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
    """Raise if the content of an argument could change unseen."""
    for x in leaves:
        if not isinstance(x, torch.Tensor) and not is_constant(x):
            x = x.it if isinstance(x, Boxed) else x
            what = f"a {type(x).__module__}.{type(x).__qualname__}"
            raise CaptureError(
                f"an argument is, or holds, {what}, whose content autotp cannot see: pass tensors, numbers and "
                "strings, in tuples, lists and dicts, or register the class with "
                "torch.utils._pytree.register_pytree_node",
                reason=f"called with {what}, into which pytree cannot see",
            )


def refuse_shared(objects: Sequence[Any]) -> None:
    """Raise if of objects that a call may change two are, or hold, one and the same."""
    if not are_distinct(objects):
        raise CaptureError(
            "two arguments are, or hold, one list or object, and the call changes an argument: a graph would change "
            "one of the two only (what the model keeps on its modules is an argument too). Pass copies",
            reason="arguments that are one object, of which the call changes one",
        )


def refuse_overlap(of: Arguments, written: Collection[int], is_alone: Callable[[Sequence[torch.Tensor]], bool]) -> None:
    """Raise if a call would write into a tensor that shares memory with another that it, or the module, has.

    Args:
        of: its arguments.
        written: the numbers of the tensors that it writes into.
        is_alone: whether tensors share no memory with what else the module holds.
    """
    if not written:
        return
    named = zip(of.spec.paths(), of.leaves, strict=True)
    paths = [path for path, x in named if isinstance(x, torch.Tensor)]
    if (pair := overlapping(of.tensors, written)) is not None:
        said = f"{paths[pair[0]]} and {paths[pair[1]]} share memory"
    elif not is_alone([of.tensors[i] for i in written]):
        said = f"one of {', '.join(paths[i] for i in sorted(written))} shares memory with another tensor on the model"
    else:
        return
    raise CaptureError(
        f"{said}, and the call writes into one of them: a graph would change that one only. Give each its own",
        reason="tensors that share memory, of which the call changes one",
    )


def are_distinct(objects: Sequence[Any]) -> bool:
    """Whether nothing that may change in what is held, or kept, among some objects is in two places."""
    seen: list[int] = []

    def visit(x: Any) -> None:
        inside = x if isinstance(x, (list, tuple, dict)) else getattr(x, "__dict__", ())
        if isinstance(x, (torch.Tensor, enum.Enum)) or callable(x):
            return
        seen.extend([] if isinstance(x, tuple) or inside == () else [id(x)])
        for each in inside.values() if isinstance(inside, dict) else inside:
            visit(each)

    for x in objects:
        if isinstance(x, (Boxed, ModuleState)):
            visit(x)
    return len(set(seen)) == len(seen)


def overlapping(tensors: Sequence[torch.Tensor], written: Collection[int]) -> tuple[int, int] | None:
    """The numbers of two tensors that share an element in memory, one of which is written to; None if all are apart.

    A graph that changes one would not change the other.
    """
    found: dict[int, list[int]] = {}
    for i, x in enumerate(tensors):
        if x.numel() and x.device.type != "meta" and 0 not in x.stride():
            found.setdefault(x.untyped_storage().data_ptr(), []).append(i)
    for several in found.values():
        for i, j in itertools.combinations(several, 2):
            if (i in written or j in written) and _overlap(_extent(tensors[i]), _extent(tensors[j])):
                return i, j
    return None


def _extent(x: torch.Tensor) -> Any:
    return x.storage_offset() * x.element_size(), x.element_size(), tuple(x.shape), tuple(x.stride())


@functools.lru_cache(maxsize=1024)
def _overlap(one: Any, other: Any) -> bool:
    (first, size, shape, strides), (second, width, _, _) = one, other

    def end(place: Any) -> int:
        offset, itemsize, shape, strides = place
        return int(offset + itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))))

    if end(one) <= second or end(other) <= first:
        return False
    if size != width or (first - second) % size:
        return True
    start, elements = min(first, second), torch.zeros((max(end(one), end(other)) - min(first, second)) // size)
    elements.as_strided(shape, strides, (first - start) // size).fill_(1)
    return bool(elements.as_strided(other[2], other[3], (second - start) // size).any())
