"""written: functions that are written at run time for one structure, so that a call need not find out what it is."""

from __future__ import annotations

import itertools
import linecache
from typing import Any

__all__ = ["compile_function"]

_numbers = itertools.count()


def compile_function(name: str, text: str, known: dict[str, Any]) -> Any:
    """The function of a name that a text defines; a traceback shows its lines.

    Args:
        name: the function's.
        text: its source.
        known: the objects that the text names.
    """
    file = f"<autotp {name} {next(_numbers)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    made = dict(known)
    exec(compile(text, file, "exec"), made)
    return made[name]
