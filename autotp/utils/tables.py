"""tables: tables and byte counts as plain text."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

__all__ = ["bytes_text", "render"]


def bytes_text(count: float) -> str:
    """A number of bytes as text: ``13.5 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def render(*paragraphs: Table | str, width: int = 140) -> str:
    """Tables and paragraphs as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, color_system=None)
    for paragraph in paragraphs:
        if isinstance(paragraph, str):
            console.print(paragraph, highlight=False, markup=False)
        else:
            console.print(paragraph)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
