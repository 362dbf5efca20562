"""codegen: functions generated from source text, each for one structure, so that a call need not inspect it again."""

from __future__ import annotations

import itertools
import linecache
from typing import Any

__all__ = ["FunctionWriter"]

_numbers = itertools.count()


class FunctionWriter:
    """Writes the source of a function line by line, and compiles it; a traceback shows its lines.

    Args:
        names: the objects that the source names, beside those that :meth:`bind` adds.
    """

    def __init__(self, **names: Any) -> None:
        self._lines: list[str] = []
        self._names = names
        self._variables = 0

    def bind(self, value: Any) -> str:
        """The name by which the source refers to an object."""
        name = f"k{len(self._names)}"
        self._names[name] = value
        return name

    def literal(self, value: Any) -> str:
        """A string or an integer as it is written; any other object by its name."""
        return repr(value) if type(value) in (str, int) else self.bind(value)

    def emit(self, line: str) -> None:
        """Add a line."""
        self._lines.append(line)

    def variable(self, expression: str) -> str:
        """The name of a new variable with this value."""
        self._variables += 1
        self.emit(f"v{self._variables} = {expression}")
        return f"v{self._variables}"

    def build(self, name: str, parameters: str, none_on: str = "") -> Any:
        """The function.

        Args:
            name: its name.
            parameters: its parameters, as they are written.
            none_on: exceptions, as they are written, on which it returns None.
        """
        lines = self._lines
        if none_on:
            lines = ["try:", *(f"    {line}" for line in lines), f"except ({none_on}):", "    return None"]
        text = "\n    ".join([f"def {name}({parameters}):", *lines]) + "\n"
        file = f"<autotp {name} {next(_numbers)}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        namespace = dict(self._names)
        exec(compile(text, file, "exec"), namespace)
        return namespace[name]
