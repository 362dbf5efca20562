"""write_checkpoint: all ranks write one checkpoint of the dense model into a folder, which appears at once."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotp.errors import AutoTPError, WeightsError
from autotp.runtime.runtime import Runtime
from autotp.saving.staging import Staging
from autotp.saving.weight_file import DenseTensor, WeightFile
from autotp.saving.write_shard import write_shard
from autotp.utils.hashing import stable_hash
from autotp.weights.shard_tensor import ShardTensor, plain

__all__ = ["dense_tensors", "write_checkpoint"]

Describe = Callable[[Path], Sequence[WeightFile]]
"""Writes what is not weights into a folder, and returns the weight files that belong there. Runs on one rank."""


def dense_tensors(model: nn.Module) -> list[DenseTensor]:
    """The tensors of the dense model's state dict, under their own names."""
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise WeightsError(f"{name} in the state dict is a {type(tensor).__name__}: only tensors can be saved")
    return [DenseTensor(name, name, dense_shape_of(tensor), tensor.dtype) for name, tensor in state.items()]


def dense_shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the dense tensor that a value of a state dict is, or is a shard of."""
    return tuple(tensor.sharding.dense_shape(tensor.shape) if isinstance(tensor, ShardTensor) else tensor.shape)


def write_checkpoint(runtime: Runtime, folder: str | os.PathLike[str], describe: Describe) -> None:
    """Write a checkpoint. Collective: all ranks of the model must call it.

    Args:
        runtime: the runtime of the parallelized model.
        folder: the folder, which all ranks see.
        describe: called on rank 0 with the folder to write into.

    Raises:
        WeightsError: the ranks do not see the same folder, or the folder cannot be written.
        MismatchError: ranks pass different folders, or some do not come within the timeout.
        AutoTPError: another rank has failed; the message says in what.
    """
    staging, steps = Staging(folder), _Steps(runtime)
    text = str(staging.folder)
    runtime.agreement.check("save", stable_hash(text), lambda: {"folder": text})
    if runtime.mesh.replica:
        _await_replica(runtime, text)
        return
    is_first = runtime.mesh.rank == 0
    try:
        _write(runtime, staging, steps, describe)
    except BaseException as error:
        if is_first:
            staging.discard()
            _tell_replicas(runtime, text, f"{type(error).__name__}: {error}")
        raise
    if is_first:
        _tell_replicas(runtime, text, "")


def _write(runtime: Runtime, staging: Staging, steps: _Steps, describe: Describe) -> None:
    mesh = runtime.mesh
    token: str = steps.on_rank_0("making the folder", staging.create)
    with steps.together("looking for the folder"):
        deadline = time.monotonic() + 10
        while not staging.sees(token):
            if time.monotonic() > deadline:
                raise WeightsError(
                    f"rank {mesh.rank} does not see {staging.path}, which rank 0 has made: save to a file system that "
                    "all ranks share"
                )
            time.sleep(0.1)
    files: Sequence[WeightFile] = steps.on_rank_0("writing the config", lambda: describe(staging.path))
    state = runtime.model.state_dict()
    for file in files:
        steps.on_rank_0(f"making {file.name}", lambda file=file: _allocate(staging.path / file.name, file))  # type: ignore[misc]
        with steps.together(f"writing {file.name}"), _opened(staging.path / file.name) as descriptor:
            for tensor in file.ordered:
                local = state[tensor.source]
                shards = runtime.shards_of(tensor.source, local)
                write_shard(descriptor, file.offsets[tensor.key], plain(local), shards, mesh.rank, mesh.tp)
    steps.on_rank_0("putting the folder in its place", staging.commit)


def _allocate(path: Path, file: WeightFile) -> None:
    """Write a file's header, and reserve its size, so that a full disk is noticed before anything is written."""
    with open(path, "wb") as opened:
        opened.write(file.header)
        opened.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, file.size)
        else:
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
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @contextlib.contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run a step that may fail on some ranks only; if it fails on any rank, all ranks raise."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = _named(caught, doing)
        self.runtime.agreement.check(f"save, {doing}", 0, dict, error)

    def on_rank_0(self, doing: str, step: Callable[[], Any]) -> Any:
        """Run a step on rank 0; its result, or its error, on all ranks."""
        result = None
        with self.together(doing):
            if self.runtime.mesh.rank == 0:
                result = step()
        return self.runtime.agreement.of_rank_0(result)


def _named(error: Exception, doing: str) -> Exception:
    """An error of the file system as one that says what was done."""
    if isinstance(error, OSError) and not isinstance(error, AutoTPError):
        named = WeightsError(f"save, {doing}: {error.strerror or error} ({error.filename or 'no file named'})")
        named.__cause__ = error
        return named
    return error


def _key(runtime: Runtime, folder: str) -> str:
    """The key under which the first replica says that it has saved."""
    count = runtime.saves[folder] = runtime.saves.get(folder, 0) + 1
    return f"autotp/saved/{stable_hash(folder):x}/{count}"


def _tell_replicas(runtime: Runtime, folder: str, error: str) -> None:
    """Tell groups of ranks that hold the same model that the checkpoint is there, or why it is not."""
    if runtime.mesh.replicas > 1:
        torch.distributed.distributed_c10d._get_default_store().set(_key(runtime, folder), error or "saved")


def _await_replica(runtime: Runtime, folder: str) -> None:
    """Wait until the first of the groups of ranks that hold the same model has saved it.

    Raises:
        AutoTPError: it has failed, or has not saved within the timeout.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    key, error = _key(runtime, folder), ""
    with _Steps(runtime).together("waiting for the ranks that hold the same shards"):
        try:
            store.wait([key], runtime.agreement.timeout)
            error = store.get(key).decode()
        except Exception as caught:
            raise AutoTPError(
                f"the first ranks that hold this model have not saved to {folder} within the timeout: call save on all "
                "ranks, or on those of the first replica alone"
            ) from caught
        if error != "saved":
            raise AutoTPError(f"the first ranks that hold this model could not save: {error}")
