"""boxed: plain arguments that a call mutates, wrapped in an object so that they are flattened like one.

A model may write into a tensor that it is passed (a cache of keys), or put other tensors into a list (one that grows).
A graph only returns values. So such an argument is flattened as an object is (:mod:`autotp.arguments.object_tree`), and
the call's mutations are applied to it afterwards. A capture shows which arguments these are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["NUMBER", "Boxed", "ModuleState", "box", "unbox"]


class Boxed:
    """A plain argument as the only attribute of an object, so that it is flattened as objects are.

    The argument is a tensor that the call writes into, a container that the call puts other tensors into, or an integer
    that varies and becomes a size (:mod:`autotp.arguments.dynamic_ints`).
    """

    def __init__(self, it: Any) -> None:
        self.it = it


NUMBER = (Boxed, "it")
"""The attribute that holds a boxed integer, as an entry of :data:`autotp.arguments.object_tree.Counts`."""


class ModuleState:
    """State that modules keep from one call to the next, by name (:mod:`autotp.arguments.module_state`)."""


def box(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], keys: Collection[int | str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Wrap the arguments with the given positions and keywords in :class:`Boxed`."""
    return tuple(Boxed(x) if i in keys else x for i, x in enumerate(args)), {
        k: Boxed(x) if k in keys else x for k, x in kwargs.items()
    }


def unbox(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Unwrap the arguments that :func:`box` has wrapped."""
    return tuple(x.it if type(x) is Boxed else x for x in args), {
        k: x.it if type(x) is Boxed else x for k, x in kwargs.items()
    }
