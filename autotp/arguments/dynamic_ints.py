"""dynamic_ints: Python integers among a call's arguments that vary between calls, such as a decoder's position.

A graph holds for one value of an integer. If an integer differs between two calls that are otherwise alike, it becomes
a size from then on, as counters in objects do (:mod:`autotp.arguments.object_tree`). A graph then holds for all values
that the model's Python treats alike. During a trace such a size is no ``int``, and the model's Python may ask for that.
So a second trace is made with the integer itself, and must call the same operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotp.arguments.boxed import Boxed

__all__ = ["DynamicInts"]


def _is_boxed_int(x: Any) -> bool:
    return type(x) is Boxed and type(x.it) is int


class DynamicInts:
    """The plain arguments that are integers and vary.

    Attributes:
        keys: their positions and keywords.
    """

    def __init__(self) -> None:
        self.keys: set[int | str] = set()
        self._constant: set[int | str] = set()
        self._seen: dict[Any, dict[int | str, int]] = {}

    def copied(self) -> DynamicInts:
        """The dynamic integers of a copy of the module."""
        copy = DynamicInts()
        copy.keys, copy._constant = set(self.keys), set(self._constant)
        return copy

    def observe(self, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Record the integers of a call that is about to be captured; returns whether one was found to vary.

        Args:
            key: the call's structure, which begins with the kinds of its leaves.
            args: the positional arguments.
            kwargs: the keyword arguments.
        """
        kinds, *rest = key
        structure = (tuple((int, "") if kind[0] is int else kind for kind in kinds), *rest)
        arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        now = {k: x for k, x in arguments if type(x) is int and x >= 0}
        before = self._seen.setdefault(structure, now)
        varying = {k for k, x in now.items() if before.get(k, x) != x} - self.keys - self._constant
        self.keys |= varying
        return bool(varying)

    def plain(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with boxed integers unboxed; None if there are no boxed integers."""
        boxed = [x for x in (*args, *kwargs.values()) if _is_boxed_int(x)]
        if not boxed:
            return None
        return tuple(x.it if _is_boxed_int(x) else x for x in args), {
            k: x.it if _is_boxed_int(x) else x for k, x in kwargs.items()
        }

    def forget(self) -> bool:
        """Treat all integers as constants from now on, if calls cannot be captured otherwise.

        Returns:
            Whether any integer was dynamic until now.
        """
        dynamic, self.keys = self.keys, set()
        self._constant |= dynamic
        return bool(dynamic)
