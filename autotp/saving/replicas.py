"""replicas: groups of ranks that hold the same model. The first of them saves it, and the others wait.

The groups have no collective in common: they speak through the store of the process group. Each tells there which
model it has parallelized. So a group knows whether an earlier one holds the same model, which then writes its
checkpoints. Groups whose models differ, as the stages of a pipeline do, write each their own.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from autotp.errors import AutoTPError
from autotp.runtime.runtime import Runtime
from autotp.saving.dense_tensors import dense_tensors
from autotp.utils.hashing import stable_hash

__all__ = ["Save", "announce_model", "writer_of"]

_count = itertools.count()
_SAVED = "saved"


def announce_model(runtime: Runtime) -> None:
    """Tell the other groups of ranks which model this one has parallelized."""
    mesh = runtime.mesh
    mesh.number = next(_count)
    if mesh.replicas > 1 and mesh.rank == 0:
        _store().set(f"autotp/model/{mesh.replica}/{mesh.number}", _described(runtime))


def writer_of(runtime: Runtime) -> int:
    """The number of the first group of ranks that holds the same model.

    Raises:
        AutoTPError: an earlier group has not parallelized any within the timeout.
    """
    mesh = runtime.mesh
    own = _store().get(f"autotp/model/{mesh.replica}/{mesh.number}") if mesh.replica else b""
    for replica in range(mesh.replica):
        key = f"autotp/model/{replica}/{mesh.number}"
        try:
            _store().wait([key], runtime.agreement.timeout)
        except Exception as caught:
            raise AutoTPError(
                f"the ranks of group {replica} have not parallelized their model within the timeout: this group, "
                f"number {mesh.replica}, cannot know which of them is to save"
            ) from caught
        if _store().get(key) == own:
            return replica
    return mesh.replica


def _described(runtime: Runtime) -> str:
    """A hash of what the model is: class, names, shapes and dtypes."""
    return f"{stable_hash(f'{type(runtime.model)} {dense_tensors(runtime.model)}'):x}"


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


class Save:
    """One save to a folder, of which other groups of ranks learn.

    Args:
        runtime: the runtime of the parallelized model.
        folder: the folder.
        writer: the group that writes.
    """

    def __init__(self, runtime: Runtime, folder: str, writer: int) -> None:
        self.runtime, self.folder = runtime, folder
        key = (folder, runtime.agreement.steps)  # else a save of the first group alone would be taken for a later one
        count = runtime.saves[key] = runtime.saves.get(key, 0) + 1
        mesh, steps = runtime.mesh, runtime.agreement.steps
        self._key = f"autotp/saved/{writer}/{mesh.number}/{stable_hash(folder):x}/{steps}/{count}"
        self._is_told = mesh.replicas > 1 and mesh.rank == 0 and mesh.replica == writer
        self._done = 0

    def progress(self) -> None:
        """Tell the waiting groups that this one goes on."""
        if self._is_told:
            self._done += 1
            _store().set(f"{self._key}/progress", str(self._done))

    def tell(self, error: BaseException | None) -> None:
        """Tell the waiting groups that the checkpoint is there, or why it is not."""
        if self._is_told:
            _store().set(self._key, _SAVED if error is None else f"{type(error).__name__}: {error}")

    def wait(self) -> None:
        """Wait until the group that writes has saved.

        Raises:
            AutoTPError: it has failed, or has made no progress within the timeout.
        """
        store, timeout, seen, pause = _store(), self.runtime.agreement.timeout.total_seconds(), b"", 1e-3
        deadline = time.monotonic() + timeout
        while not store.check([self._key]):
            if store.check([f"{self._key}/progress"]) and (now := store.get(f"{self._key}/progress")) != seen:
                seen, deadline = now, time.monotonic() + timeout
            if time.monotonic() > deadline:
                raise AutoTPError(
                    f"the first ranks that hold this model have not saved it to {self.folder} within the timeout: call "
                    "save on all ranks, or on those of the first group alone"
                )
            time.sleep(pause)
            pause = min(0.2, 2 * pause)
        if (error := store.get(self._key).decode()) != _SAVED:
            raise AutoTPError(f"the first ranks that hold this model could not save it: {error}")
