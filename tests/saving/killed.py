"""Processes that end themselves at the n-th operation on the file system."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EVENTS = frozenset({"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "shutil.rmtree"})
"""Python's audit events of operations that change folders or files."""


def kill_at(number: int, below: Path) -> None:
    """Let this process kill itself right before its ``number``-th operation below a folder."""
    count = itertools.count()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS or event == "ctypes.dlsym":
            concerns = event in ("ctypes.dlsym", "os.remove", "os.rmdir") or str(below) in str(args[0])
            if concerns and next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked(work: Callable[[], Any]) -> int:
    """Run some work in a forked process; returns how it ended, as ``waitpid`` says."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def deaths(work: Callable[[], Any], below: Path) -> Iterator[int]:
    """Run some work again and again, killed at a later operation each time, until it lives; yields after each."""
    for number in itertools.count():

        def killed(number: int = number) -> None:
            kill_at(number, below)
            work()

        status = forked(killed)
        assert os.WIFSIGNALED(status) or status == 0, status
        yield number
        if status == 0:
            return
