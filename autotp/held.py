"""held: plain arguments that a call changes, as objects that can be opened (:mod:`autotp.states`).

A model may write into a tensor that it is given (a cache of keys), or put others into a list (one that grows). A graph
gives back what it makes, so such an argument is opened like an object, and gets what the call changes in it. Which
arguments these are shows when a call is captured.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

__all__ = ["NUMBER", "Held", "Remembered", "are_distinct", "held", "overlapping", "released"]


class Held:
    """A plain argument that a call changes: a tensor that is written to, or a container that gets other tensors; or a
    number that calls take for a size (:mod:`autotp.numbers`).

    Such an argument is opened as an object is, as the one attribute of this.
    """

    def __init__(self, it: Any) -> None:
        self.it = it


NUMBER = (Held, "it")
"""The attribute that is a number, if it is one that counts (:data:`autotp.states.Counts`)."""


class Remembered:
    """What modules keep from one call to the next, by name (:mod:`autotp.remembered`)."""


def held(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], places: Collection[int | str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with those at some places, numbers and keywords, as :class:`Held`."""
    return tuple(Held(x) if i in places else x for i, x in enumerate(args)), {
        k: Held(x) if k in places else x for k, x in kwargs.items()
    }


def released(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with what :func:`held` has put around some of them taken off."""
    return tuple(x.it if type(x) is Held else x for x in args), {
        k: x.it if type(x) is Held else x for k, x in kwargs.items()
    }


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
        if isinstance(x, (Held, Remembered)):
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
            if (i in written or j in written) and _overlap(_place(tensors[i]), _place(tensors[j])):
                return i, j
    return None


def _place(x: torch.Tensor) -> Any:
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
