"""patching: put a function of autotp's in the place of a library's, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["replace_function"]


def replace_function(holder: Any, name: str, replacement: Callable[..., Any]) -> bool:
    """Replace a function of a module, or a method of a class, by one that gets the original as first argument.

    Code that looks the function up in its module or class calls the replacement from then on. A function that was
    replaced before stays as it is.

    Args:
        holder: the module or class that defines the function.
        name: its name there.
        replacement: called as ``replacement(original, *args, **kwargs)``; the arguments of a method begin with the
            object, those of a class method with the class.

    Returns:
        Whether the holder defines such a function.

    Example:
        >>> replace_function(Optimizer, "state_dict", lambda original, optimizer: original(optimizer))
    """
    defined = vars(holder).get(name)
    if defined is None:
        return False
    original = defined.__func__ if isinstance(defined, classmethod) else defined
    if hasattr(original, "_autotp"):
        return True

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    replaced._autotp = name  # type: ignore[attr-defined]
    setattr(holder, name, classmethod(replaced) if isinstance(defined, classmethod) else replaced)
    return True
