"""generate_attributes: attributes that only the ``generate`` of transformers reads, left out of the guards.

A graph is guarded by the plain attributes of the model at capture. ``generate`` sets and reads some of its own (its
settings, the longest cache so far). They would lead to a new graph for each prompt, though no forward reads them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

__all__ = ["generate_attributes"]

_KEPT = frozenset({"generation_config", "_previous_max_cache_length"})


@functools.lru_cache(maxsize=4096)
def generate_attributes(cls: Any) -> frozenset[str]:
    """The attributes of a module's class that only ``generate`` reads: no other code of the class names them."""
    if not callable(getattr(cls, "generate", None)):
        return frozenset()
    own = [c for c in cls.__mro__ if _is_of_a_model(c.__module__)]
    generating = {n for c in cls.__mro__ if c not in own for n in vars(c)}
    named = {x for c in own for n, f in vars(c).items() if n not in generating or n == "forward" for x in _names(f)}
    return _KEPT - named


def _is_of_a_model(module: str) -> bool:
    return not f"{module}.".startswith(("torch.", "builtins.", "transformers.")) or module.startswith(
        "transformers.models"
    )


def _names(function: Any) -> Iterator[str]:
    """The names and strings in a function's code, and in what it wraps."""
    while function is not None:
        function = getattr(function, "__func__", getattr(function, "fget", function))
        code = getattr(function, "__code__", None)
        stack = [code] if code is not None else []
        while stack:
            code = stack.pop()
            yield from code.co_names
            yield from (x for x in code.co_consts if isinstance(x, str))
            stack += [x for x in code.co_consts if isinstance(x, types.CodeType)]
        function = getattr(function, "__wrapped__", None)
