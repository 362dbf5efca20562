"""renamed: old names of attributes, which still work with a DeprecationWarning."""

from __future__ import annotations

import warnings
from typing import Any

__all__ = ["renamed"]


def renamed(old: str, new: str) -> property:
    """A read-only property with an attribute's ``old`` name; it warns, and gives the value of the ``new`` one."""

    def read(self: Any) -> Any:
        warnings.warn(f"{type(self).__name__}.{old} is now {new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    return property(read, doc=f"The old name of ``{new}``.")
