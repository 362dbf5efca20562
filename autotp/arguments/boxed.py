"""held: plain arguments that a call changes, as objects that can be opened (:mod:`autotp.arguments.object_tree`).

A model may write into a tensor that it is given (a cache of keys), or put others into a list (one that grows). A graph
gives back what it makes, so such an argument is opened like an object, and gets what the call changes in it. Which
arguments these are shows when a call is captured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["NUMBER", "Boxed", "ModuleState", "box", "unbox"]


class Boxed:
    """A plain argument that a call changes: a tensor that is written to, or a container that gets other tensors; or a
    number that calls take for a size (:mod:`autotp.arguments.dynamic_ints`).

    Such an argument is opened as an object is, as the one attribute of this.
    """

    def __init__(self, it: Any) -> None:
        self.it = it


NUMBER = (Boxed, "it")
"""The attribute that is a number, if it is one that counts (:data:`autotp.arguments.object_tree.Counts`)."""


class ModuleState:
    """What modules keep from one call to the next, by name (:mod:`autotp.arguments.module_state`)."""


def box(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], places: Collection[int | str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with those at some places, numbers and keywords, as :class:`Boxed`."""
    return tuple(Boxed(x) if i in places else x for i, x in enumerate(args)), {
        k: Boxed(x) if k in places else x for k, x in kwargs.items()
    }


def unbox(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with what :func:`box` has put around some of them taken off."""
    return tuple(x.it if type(x) is Boxed else x for x in args), {
        k: x.it if type(x) is Boxed else x for k, x in kwargs.items()
    }
