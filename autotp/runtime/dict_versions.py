"""versions: whether anything has been set in any of many dicts, without looking into them.

torch's compiler asks the same before each run of its code, and has a number for each dict that is another one after
each change (PEP 509, and a counter of torch's own where Python no longer has one). Asked from Python it takes some
40 ns for each (60 in Python 3.12); torch's guards ask for all of them in one call, for 11 ns each (33), but take some
10 us for each to be made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["DictVersions"]

try:
    from torch._C._dynamo.guards import RootGuardManager, dict_version
except ImportError:  # they are torch's own, for its compiler
    dict_version = None  # type: ignore[assignment]

_SETTLED = 400
"""How many looks in a row must show no change before guards are made: about as many as it takes to pay for them."""
_MANY = 100
"""Of fewer dicts the numbers are asked as quickly."""


class DictVersions:
    """The versions that some dicts have now.

    Args:
        dicts: the dicts, which are kept.

    Example:
        >>> d = {"a": 1}
        >>> versions = Versions([d])
        >>> versions.same()
        True
        >>> d["a"] = 2
        >>> versions.same()
        False
    """

    def __init__(self, dicts: Sequence[dict[str, Any]]) -> None:
        self._dicts = list(dicts)
        self._numbers = self._now()
        self._looks = 0
        self._guards: Any = None

    def same(self) -> bool:
        """Whether nothing has been set in the dicts since. In doubt, no."""
        if self._guards is not None:
            found: bool = self._guards.check(self._dicts)
            return found
        if self._numbers is None or self._now() != self._numbers:
            return False
        self._looks += 1
        if self._looks == _SETTLED and len(self._dicts) >= _MANY:
            guards = _guards(self._dicts)
            if self._now() != self._numbers:  # they stand for what another thread has set meanwhile
                return False
            self._guards = guards
        return True

    def _now(self) -> list[int] | None:
        return list(map(dict_version, self._dicts)) if dict_version is not None else None


def _guards(dicts: list[dict[str, Any]]) -> Any:
    """What checks that each of a list of dicts has the version that it has now; None if torch has changed it."""
    try:
        from torch._dynamo.guards import GuardManagerType

        root = RootGuardManager()
        for i, each in enumerate(dicts):
            place = root.list_getitem_manager(i, f"[{i}]", each, GuardManagerType.GUARD_MANAGER)
            place.add_dict_version_guard(each, ["versions"], None)
        return root if root.check(dicts) else None
    except (AttributeError, ImportError, TypeError):
        return None
