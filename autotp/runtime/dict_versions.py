"""dict_versions: whether any of many dicts has been changed, without reading their content.

torch's compiler guards its code in the same way. Each dict has a version number that grows with each change (PEP 509,
and a counter of torch's own where Python no longer has one). Reading a number from Python takes some 40 ns (60 in
Python 3.12). torch's guards read all numbers in one call, for 11 ns each (33), but take some 10 us each to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["DictVersions"]

try:
    from torch._C._dynamo.guards import RootGuardManager, dict_version
except ImportError:  # they are torch's own, for its compiler
    dict_version = None  # type: ignore[assignment]

_UNCHANGED = 400
"""The number of checks in a row without a change after which guards are made, so that they pay."""
_MANY = 100
"""The number of dicts from which on guards are faster than reading the numbers from Python."""


class DictVersions:
    """The present versions of some dicts.

    Args:
        dicts: the dicts; references to them are kept.

    Example:
        >>> d = {"a": 1}
        >>> versions = DictVersions([d])
        >>> versions.same()
        True
        >>> d["a"] = 2
        >>> versions.same()
        False
    """

    def __init__(self, dicts: Sequence[dict[str, Any]]) -> None:
        self._dicts = list(dicts)
        self._numbers = self._now()
        self._checks = 0
        self._guards: Any = None

    def same(self) -> bool:
        """Whether no dict has changed since. False in doubt."""
        if self._guards is not None:
            unchanged: bool = self._guards.check(self._dicts)
            return unchanged
        if self._numbers is None or self._now() != self._numbers:
            return False
        self._checks += 1
        if self._checks == _UNCHANGED and len(self._dicts) >= _MANY:
            guards = _guards(self._dicts)
            if self._now() != self._numbers:  # another thread has changed a dict meanwhile
                return False
            self._guards = guards
        return True

    def _now(self) -> list[int] | None:
        return list(map(dict_version, self._dicts)) if dict_version is not None else None


def _guards(dicts: list[dict[str, Any]]) -> Any:
    """A guard that each of a list of dicts has its present version; None if torch's guards are not what they were."""
    try:
        from torch._dynamo.guards import GuardManagerType

        root = RootGuardManager()
        for i, entry in enumerate(dicts):
            manager = root.list_getitem_manager(i, f"[{i}]", entry, GuardManagerType.GUARD_MANAGER)
            manager.add_dict_version_guard(entry, ["versions"], None)
        return root if root.check(dicts) else None
    except (AttributeError, ImportError, TypeError):
        return None
