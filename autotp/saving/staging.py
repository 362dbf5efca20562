"""staging: write a folder beside the old one, and put it in its place at once.

All files are written into a hidden folder beside the one that is saved, ``.name.saving``. When all of them are there,
the two folders change places, by one call of the operating system where it has one (``renameat2`` of Linux). So a
process that dies at any moment leaves the old folder or the new one, never a mixture. A file lock that a living
process holds tells its folder from one that a dead process has left; the next save removes that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import IO

from autotp.errors import WeightsError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Staging"]

_WEIGHTS = re.compile(r"(model|pytorch_model)(\.[^.]+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
"""The names of the weight files of the old checkpoint, which do not belong to the new one."""
_LOCK, _TOKEN = ".lock", ".token"
_EXCHANGE = 2
"""``RENAME_EXCHANGE``: the two paths change places atomically."""
_HERE = -100
"""``AT_FDCWD``: paths are those of this process."""


class Staging:
    """A folder that is written under another name, and then takes its place. One rank makes it, and all write into it.

    Args:
        folder: the folder to write, which may exist.

    Attributes:
        folder: the folder, without symbolic links.
        path: where to write until then.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.path = self.folder.parent / f".{self.folder.name}.saving"
        self._old = self.folder.parent / f".{self.folder.name}.old"
        self._lock: IO[str] | None = None

    def create(self) -> str:
        """Make the folder, and remove what a process that died has left.

        Returns:
            A text that is in the folder, by which other ranks know it.

        Raises:
            WeightsError: there is a file in the folder's place, or another process saves to it now.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise WeightsError(f"{self.folder} is a file: pass the name of a folder to save into")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self._old.is_dir() and not self.folder.exists():  # a process died between two renames
            self._old.rename(self.folder)
        if self.path.exists():
            self._remove_leftover()
        shutil.rmtree(self._old, ignore_errors=True)
        token = secrets.token_hex(16)
        fresh = self.path.with_name(f"{self.path.name}-{token[:8]}")
        fresh.mkdir()
        (fresh / _TOKEN).write_text(token)
        self._lock = open(fresh / _LOCK, "w")  # noqa: SIM115  # held until the folder takes its place
        if fcntl is not None:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fresh.rename(self.path)
        return token

    def _remove_leftover(self) -> None:
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context(open(self.path / _LOCK))
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                pass
            except BlockingIOError:
                raise WeightsError(
                    f"another process is saving to {self.folder} now: wait for it, or save to another folder. (If two "
                    "groups of ranks hold the same model, let one of them save.)"
                ) from None
            shutil.rmtree(self.path)

    def sees(self, token: str) -> bool:
        """Whether this process sees the folder that another rank has made."""
        with contextlib.suppress(OSError):
            os.listdir(self.path)  # a network file system may remember that it was not there
            return (self.path / _TOKEN).read_text() == token
        return False

    def commit(self) -> None:
        """Put the folder in its place. Files of the old folder that are not its weights are kept.

        Raises:
            OSError: the file system refuses; the old folder is as it was.
        """
        if not self.folder.exists():
            self.path.rename(self.folder)
        else:
            _link_others(self.folder, self.path)
            if not _exchange(self.path, self.folder):
                self.folder.rename(self._old)
                self.path.rename(self.folder)
                shutil.rmtree(self._old, ignore_errors=True)
            shutil.rmtree(self.path, ignore_errors=True)
        for name in (_TOKEN, _LOCK):  # not before: another process would take the folder for a leftover
            (self.folder / name).unlink()
        self._release()

    def discard(self) -> None:
        """Remove the folder; the old one stays as it is."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _link_others(old: Path, new: Path) -> None:
    """Give the new folder the other files of the old one, too: tokenizers, logs, checkpoints in folders."""
    for entry in old.iterdir():
        if (
            entry.name in (_TOKEN, _LOCK)
            or (new / entry.name).exists()
            or (entry.is_file() and _WEIGHTS.fullmatch(entry.name))
        ):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name; copy it where the file system has no second names."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places at once; False if this system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0)
