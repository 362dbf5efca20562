"""write_checkpoint: all ranks write one checkpoint of the dense model into a folder, which appears at once."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotp.errors import AutoTPError, WeightsError
from autotp.runtime.runtime import Runtime
from autotp.saving.replicas import Save, writer_of
from autotp.saving.staging import Staging
from autotp.saving.weight_file import WeightFile
from autotp.saving.write_shard import write_shard
from autotp.utils.hashing import stable_hash
from autotp.weights.progress import LARGE, Progress
from autotp.weights.shard_tensor import plain

__all__ = ["PATIENCE", "write_checkpoint"]

PATIENCE = 10.0
"""How many seconds a rank waits to see the folder that rank 0 has made."""

Describe = Callable[[Path], Sequence[WeightFile]]
"""Writes what is not weights into a folder, and returns the weight files that belong there. Runs on one rank."""


def write_checkpoint(
    runtime: Runtime, folder: str | os.PathLike[str], describe: Describe, options: Mapping[str, str]
) -> None:
    """Write a checkpoint. Collective: all ranks of the model must call it.

    Args:
        runtime: the runtime of the parallelized model.
        folder: the folder, which all ranks see.
        describe: called on rank 0 with the folder to write into.
        options: what else the ranks must agree on, in words.

    Raises:
        WeightsError: the ranks do not see the same folder, or the folder cannot be written.
        MismatchError: ranks pass different folders or options, or some do not come within the timeout.
        AutoTPError: another rank has failed; the message says in what.
    """
    staging = Staging(folder)
    text = str(staging.folder)
    steps = _Steps(runtime, text)
    details = {"folder": text, "model": type(runtime.model).__name__, **options}
    mesh = runtime.mesh
    writer = mesh.replica and steps.on_rank_0("asking which ranks write", lambda: writer_of(runtime))
    save = Save(runtime, text, writer)
    try:
        runtime.agreement.check("save", stable_hash(str(details)), lambda: details)
        if writer != mesh.replica:
            with steps.together("waiting for the ranks that hold the same shards"):
                save.wait()
            return
        _write(runtime, staging, steps, describe, save)
    except BaseException as error:
        staging.discard()
        with contextlib.suppress(Exception):  # the process that keeps the store may be gone
            save.tell(error)
        raise
    save.tell(None)


def _write(runtime: Runtime, staging: Staging, steps: _Steps, describe: Describe, save: Save) -> None:
    mesh = runtime.mesh
    with steps.together("looking at the folder"):
        staging.check()
    token: str = steps.on_rank_0("making the folder", staging.create)
    with steps.together("looking for the folder"):
        _await_folder(staging, token, mesh.rank)
    files: Sequence[WeightFile] = steps.on_rank_0("writing the config", lambda: describe(staging.path))
    state = runtime.model.state_dict()
    whole = sum(file.size for file in files)
    with Progress(whole // mesh.tp, whole > LARGE, bool(mesh.rank or mesh.replica), ("writing", "wrote")) as progress:
        for file in files:
            _write_file(runtime, staging, steps, file, state, progress)
            save.progress()
    steps.on_rank_0("putting the folder in its place", staging.commit)


def _write_file(
    runtime: Runtime, staging: Staging, steps: _Steps, file: WeightFile, state: Mapping[str, Any], progress: Progress
) -> None:
    """Write a file of the checkpoint, each rank its part."""
    mesh, path = runtime.mesh, staging.path / file.name
    steps.on_rank_0(f"making {file.name}", lambda: _allocate(path, file))
    with steps.together(f"writing {file.name}"), _opened(path) as descriptor:
        for tensor in file.ordered:
            local = state[tensor.source]
            shards = runtime.shards_of(tensor.source, local)
            offset = file.offsets[tensor.key]
            progress.advance(write_shard(descriptor, offset, plain(local), shards, mesh.rank, mesh.tp))


def _await_folder(staging: Staging, token: str, rank: int) -> None:
    """Wait until the folder that rank 0 has made is seen here: network file systems take a moment.

    Raises:
        WeightsError: it is not.
    """
    deadline = time.monotonic() + PATIENCE
    while not staging.sees(token):
        if time.monotonic() > deadline:
            raise WeightsError(
                f"rank {rank} does not see {staging.path}, which rank 0 has made: save to a file system that all ranks "
                "share"
            )
        time.sleep(0.1)


def _allocate(path: Path, file: WeightFile) -> None:
    """Write a file's header, and reserve its size, so that a full disk is noticed before anything is written."""
    with open(path, "wb") as opened:
        opened.write(file.header)
        opened.flush()
        try:
            os.posix_fallocate(opened.fileno(), 0, file.size)
        except AttributeError:  # not on macOS
            opened.truncate(file.size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # those say that the file system cannot
                raise
            opened.truncate(file.size)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class _Steps:
    """The steps of a save; each ends on all ranks, or fails on all of them.

    Args:
        runtime: the runtime of the parallelized model.
        folder: the folder, for messages.
    """

    def __init__(self, runtime: Runtime, folder: str) -> None:
        self.runtime, self.folder = runtime, folder

    @contextlib.contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run a step that may fail on some ranks only; if it fails on any rank, all ranks raise."""
        error: BaseException | None = None
        told: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = told = self._named(caught, doing)
        except BaseException as caught:  # Ctrl-C, or a signal that ends the process
            error, told = caught, AutoTPError(f"save, {doing}: the process was interrupted")
        try:
            self.runtime.agreement.check(f"save, {doing}", 0, dict, told)
        except Exception:
            if error is not None:
                raise error from error.__cause__
            raise

    def on_rank_0(self, doing: str, step: Callable[[], Any]) -> Any:
        """Run a step on rank 0; its result, or its error, on all ranks."""
        result = None
        with self.together(doing):
            if self.runtime.mesh.rank == 0:
                result = step()
        try:
            return self.runtime.agreement.of_rank_0(result)
        except RuntimeError as failure:
            raise self.runtime.agreement.missing(failure) from failure

    def _named(self, error: Exception, doing: str) -> Exception:
        """An error of the file system as one that says what was done."""
        if isinstance(error, OSError) and not isinstance(error, AutoTPError):
            file = f" ({error.filename})" if error.filename else ""
            text = error.strerror or str(error)
            named = WeightsError(f"save to {self.folder}, {doing}: {text}{file}. What was there before is as it was")
            named.__cause__ = error
            return named
        return error
