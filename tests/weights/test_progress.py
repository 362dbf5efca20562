"""Reading that takes long is told of: by a bar, on terminals only, and by a line in the log."""

from __future__ import annotations

import io
import logging
import re
from typing import Any

import pytest
import rich.console

from autotp.weights import progress
from autotp.weights.progress import Progress

CONSOLE = rich.console.Console


class Terminal(io.StringIO):
    """Standard error, which is a terminal or not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def _read(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, **options: Any) -> str:
    """What is written while 3 GB are read."""
    error = Terminal(is_terminal)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(rich.console, "Console", lambda stderr: CONSOLE(file=error, width=100))
    with Progress(3_000_000_000, **options) as shown:
        for _ in range(3):
            shown.advance(1_000_000_000)
    return error.getvalue()


def test_a_bar_on_terminals_and_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "autotp")
    assert "3.0/3.0 GB" in _read(monkeypatch, True, large=True, silent=False)
    assert _read(monkeypatch, False, large=True, silent=False) == ""
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 2
    assert all(re.fullmatch(r"read 3\.00 GB of weights in \d+\.\d s", line) for line in lines)
    monkeypatch.setattr(progress, "SLOW", -1)
    assert "reading weights" in _read(monkeypatch, True, large=False, silent=False), "slow"


def test_small_quick_silent_and_failed_reading_is_not_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "autotp")
    assert _read(monkeypatch, True, large=False, silent=False) == ""
    assert _read(monkeypatch, True, large=True, silent=True) == ""
    with pytest.raises(OSError, match="gone"), Progress(1, large=True, silent=False):
        raise OSError("gone")
    assert not caplog.records
