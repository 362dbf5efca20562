"""numbers: Python numbers among a call's arguments that are others in later calls, such as where a decoder is.

A graph holds for one value of a number. One that is another in a call that is otherwise alike is taken for a size from
then on, as the counts in objects are (:mod:`autotp.arguments.object_tree`), and a graph holds for all that its Python
treats alike. While it is traced such a size is no ``int``, and Python may ask: so what was called must be what a trace
with the number itself calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotp.arguments.boxed import Boxed

__all__ = ["DynamicInts"]


def _is_number(x: Any) -> bool:
    return type(x) is Boxed and type(x.it) is int


class DynamicInts:
    """The plain arguments that are numbers, and not always the same.

    Attributes:
        places: which, by number or keyword.
    """

    def __init__(self) -> None:
        self.places: set[int | str] = set()
        self._constant: set[int | str] = set()
        self._seen: dict[Any, dict[int | str, int]] = {}

    def copied(self) -> DynamicInts:
        """What a copy of the module knows."""
        copy = DynamicInts()
        copy.places, copy._constant = set(self.places), set(self._constant)
        return copy

    def look(self, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Look at a call that is about to be captured; whether it shows that some number is not always the same.

        Args:
            key: its structure, which begins with the kinds of its leaves.
            args: the positional arguments.
            kwargs: those by keyword.
        """
        kinds, *rest = key
        alike = (tuple((int, "") if kind[0] is int else kind for kind in kinds), *rest)
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        now = {k: x for k, x in given if type(x) is int and x >= 0}
        before = self._seen.setdefault(alike, now)
        found = {k for k, x in now.items() if before.get(k, x) != x} - self.places - self._constant
        self.places |= found
        return bool(found)

    def plain(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Arguments with such numbers as they are; None if there are none."""
        taken = [x for x in (*args, *kwargs.values()) if _is_number(x)]
        if not taken:
            return None
        return tuple(x.it if _is_number(x) else x for x in args), {
            k: x.it if _is_number(x) else x for k, x in kwargs.items()
        }

    def forget(self) -> bool:
        """Take all numbers for constants from now on: calls cannot be captured otherwise; whether any was not."""
        found, self.places = self.places, set()
        self._constant |= found
        return bool(found)
