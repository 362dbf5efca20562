"""progress: how far a checkpoint has been read or written, as a bar on terminals and a line in the log."""

from __future__ import annotations

import logging
import time
from typing import Any

__all__ = ["LARGE", "SLOW", "Progress"]

LARGE = 1 << 30
"""The bytes of a checkpoint from which on it is told of, however fast it is."""
SLOW = 2.0
"""The seconds from which on any checkpoint is told of."""


class Progress:
    """Tells how much of a checkpoint is done, if there is much of it or it takes long.

    A bar is shown where standard error is a terminal. At the end the logger ``autotp`` gets a line.

    Args:
        total: the bytes that will be read or written.
        large: whether to tell of it from the start.
        silent: whether to tell nothing.
        doing: what is done, and its past participle.
    """

    def __init__(self, total: int, large: bool, silent: bool, doing: tuple[str, str] = ("reading", "read")) -> None:
        self._doing = doing
        self.count, self._total, self._large, self._silent = 0, total, large, silent
        self._start, self._is_shown, self._bar = time.monotonic(), False, None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self._tells():
            seconds = time.monotonic() - self._start
            line = "%s %.2f GB of weights in %.1f s"
            logging.getLogger("autotp").info(line, self._doing[1], self.count / 1e9, seconds)

    def advance(self, count: int) -> None:
        """Count bytes that are done, and move the bar."""
        self.count += count
        if not self._is_shown and self._tells():
            self._is_shown, self._bar = True, _bar(self._total, self._doing[0])
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.count)

    def _tells(self) -> bool:
        return not self._silent and (self._large or time.monotonic() - self._start > SLOW)


def _bar(total: int, doing: str) -> Any:
    """A bar on the terminal, with bytes and seconds; None if there is no terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = progress.BarColumn(), progress.DownloadColumn(), progress.TimeElapsedColumn()
    bar = progress.Progress(f"{doing} weights", *columns, console=console)
    bar.add_task("", total=total)
    bar.start()
    return bar
