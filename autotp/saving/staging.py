"""staging: write a folder beside the old one, and put it in its place at once.

All files are written into a hidden folder beside the one that is saved, ``.name.saving``. When all of them are there,
the two folders change places, by one call of the operating system where it has one (``renameat2`` of Linux). So a
process that dies at any moment leaves the old folder or the new one, never a mixture. A file lock that a living
process holds tells its folder from one that a dead process has left; the next save removes that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
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

_WEIGHTS = re.compile(r"(?:pytorch_)?((?:adapter_)?model)(\.[^.]+?)?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")
_INDEX = re.compile(r"(?:pytorch_)?((?:adapter_)?model)\.(?:safetensors|bin)\.index(\.[^.]+?)?\.json")
"""The names of weight files, and of their indices: the kind of weights, and the variant (``fp16``) if there is one."""
_LOCK, _TOKEN = ".lock", ".token"
_UPDATED = "README.md"
"""The model card: writers change the one that is there."""
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.EAGAIN, errno.ENOENT)
"""Errors that mean that another process makes the same folder."""
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
        self._old = self.folder.parent / f".{self.folder.name}.saving-old"
        self._lock: IO[str] | None = None

    def check(self) -> None:
        """Raise if the folder cannot be replaced.

        Raises:
            WeightsError: it is a file, or this process's working directory is in it, and would be removed.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise WeightsError(f"{self.folder} is a file: pass the name of a folder to save into")
        here = Path(os.path.realpath(os.getcwd()))
        if here.is_relative_to(self.folder):
            raise WeightsError(
                f"{self.folder} is, or holds, the working directory {here}, which would be removed, since a new folder "
                "takes the place of the old one: save into a folder of its own, such as one inside it"
            )

    def create(self) -> str:
        """Make the folder, and remove what a process that died has left.

        Returns:
            A text that is in the folder, by which other ranks know it.

        Raises:
            WeightsError: another process saves to it now.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        token = secrets.token_hex(16)
        fresh = self.path.with_name(f"{self.path.name}-{token[:8]}")
        try:
            fresh.mkdir()
            self._lock = open(fresh / _LOCK, "w")  # noqa: SIM115  # held until the folder takes its place
            _try_lock(self._lock)
            (fresh / _TOKEN).write_text(token)
            if self.folder.exists():
                shutil.copymode(self.folder, fresh)
            if (self.folder / _UPDATED).is_file():
                shutil.copy2(self.folder / _UPDATED, fresh / _UPDATED)
            fresh.rename(self.path)
        except BaseException as error:
            shutil.rmtree(fresh, ignore_errors=True)
            self._release()
            if isinstance(error, OSError) and error.errno in _TAKEN:
                raise self._busy() from error
            raise
        return token

    def _remove_leftovers(self) -> None:
        """Remove what dead processes have left; restore the old folder if one died between two renames."""
        ours = re.compile(re.escape(self.path.name) + r"(-old|-[0-9a-f]{8})?")
        left = [self.path.with_name(name) for name in os.listdir(self.path.parent) if ours.fullmatch(name)]
        if any(map(_in_use, (self.path, *left, self.folder))):  # the folder last: there the lock goes at last
            raise self._busy()
        self._restore()
        for path in left:
            if path.exists():
                shutil.rmtree(path)

    def _restore(self) -> None:
        if self._old.is_dir() and not self.folder.exists():
            self._old.rename(self.folder)

    def _busy(self) -> WeightsError:
        return WeightsError(
            f"another process is saving to {self.folder} now: wait for it, or save to another folder. (If two groups "
            "of ranks hold the same model, let one of them save.)"
        )

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
            old = self._exchange()
            with contextlib.suppress(OSError):
                _link_others(old, self.folder)  # what others have written meanwhile
            shutil.rmtree(old, ignore_errors=True)
        for name in (_TOKEN, _LOCK):  # not before: another process would take the folder for a leftover
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        self._release()

    def _exchange(self) -> Path:
        """Let the new folder take the place of the old one; returns where the old one is."""
        if _exchange(self.path, self.folder):
            return self.path
        self.folder.rename(self._old)
        try:
            self.path.rename(self.folder)
        except BaseException:
            self._restore()
            raise
        return self._old

    def discard(self) -> None:
        """Remove the folder; the old one stays as it is."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._restore()
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _try_lock(file: IO[str]) -> None:
    """Lock a file for as long as it is open; without effect on file systems without locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # then two processes that save to one folder are not told apart
        return


def _in_use(folder: Path) -> bool:
    """Whether a living process writes into a folder, or is about to put it in its place."""
    try:
        with open(folder / _LOCK) as lock:
            _try_lock(lock)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _family(name: str) -> tuple[str | None, ...] | None:
    """Which weights a file is a part of: the kind and the variant; None: of none."""
    match = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    return match.groups() if match else None


def _link_others(old: Path, new: Path) -> None:
    """Give the new folder the other files of the old one, too: tokenizers, logs, checkpoints in folders.

    Weights that the new folder has anew are left out, whichever files they were in.
    """
    written = {_family(name) for name in os.listdir(new)} - {None}
    for entry in os.scandir(old):
        source, target = old / entry.name, new / entry.name
        if entry.name in (_TOKEN, _LOCK):
            continue
        if entry.is_dir(follow_symlinks=False):
            if not os.path.lexists(target):
                target.mkdir()
                _link_others(source, target)
                shutil.copystat(source, target)
            elif target.is_dir() and not target.is_symlink():
                _link_others(source, target)
        elif not os.path.lexists(target) and _family(entry.name) not in written:
            _link(source, target)


def _link(source: Path, target: Path) -> None:
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
