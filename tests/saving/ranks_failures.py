"""Work on real processes: saves that fail on one rank, and processes that die in one."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.saving import staging, write_checkpoint
from tests.comparison import raised
from tests.saving.killed import kill_at
from tests.saving.ranks import files_of
from tests.weights.ranks_data_parallel import IDS, net

Result = dict[str, Any]


def tried(call: Callable[[], Any]) -> str:
    """How a call ends, interrupts included."""
    try:
        return raised(call)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may exceed 4 KiB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        yield
    finally:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )


def full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def broken(*_: Any, **__: Any) -> Any:
    raise ValueError("broken")


TROUBLES: dict[str, tuple[int, Callable[[], Any]]] = {
    "disk full at a write of rank 0": (0, lambda: mock.patch.object(os, "pwrite", full)),
    "disk full at a write of rank 1": (1, lambda: mock.patch.object(os, "pwrite", full)),
    "disk full when a file is made": (0, lambda: mock.patch.object(os, "posix_fallocate", full)),
    "limit of file sizes": (0, small_files),
    "limit of file sizes on rank 1": (1, small_files),
    "an error on rank 1": (1, lambda: mock.patch.object(write_checkpoint, "write_shard", broken)),
    "Ctrl-C on rank 0": (0, lambda: mock.patch.object(write_checkpoint, "write_shard", interrupt)),
    "Ctrl-C on rank 1": (1, lambda: mock.patch.object(write_checkpoint, "write_shard", interrupt)),
    "Ctrl-C when the folder is put in its place": (0, lambda: mock.patch.object(staging, "_exchange", interrupt)),
    "an error when the folder is put in its place": (0, lambda: mock.patch.object(staging, "_link_others", broken)),
    "rank 1 does not see the folder": (1, lambda: mock.patch.object(staging.Staging, "sees", return_value=False)),
}


def failures(rank: int, world: int, folder: Path) -> Result:
    """For each trouble: the error, and whether the old checkpoint is whole, alone, and replaced by the next save."""
    result: Result = {}
    place = folder / "place" / "ckpt"
    model = autotp.parallelize(net(), world, example_inputs=(IDS[:4],), timeout=timedelta(seconds=30))
    autotp.save(model, place)
    with torch.no_grad():
        model.norm.weight += 1  # type: ignore[union-attr, operator]
    old = files_of(place)
    write_checkpoint.PATIENCE = 0.5
    for name, (victim, trouble) in TROUBLES.items():
        if rank == victim:
            with trouble():
                error = tried(lambda: autotp.save(model, place))
        else:
            error = tried(lambda: autotp.save(model, place))
        dist.barrier()
        result[name] = error, files_of(place) == old and os.listdir(place.parent) == ["ckpt"]
        dist.barrier()
    result["folders differ"] = raised(lambda: autotp.save(model, folder / f"{rank} ckpt"))
    result["sizes differ"] = raised(lambda: autotp.save(model, place, max_shard_size=1000 + rank))
    result["no size"] = raised(lambda: autotp.save(model, place, max_shard_size="many"))
    (folder / f"cwd {rank}").mkdir()
    os.chdir(folder / f"cwd {rank}")
    result["relative"] = raised(lambda: autotp.save(model, "ckpt"))
    result["file"] = raised(lambda: autotp.save(model, place / "model.safetensors"))
    if rank == 1:
        os.chdir(place)
    result["working directory of rank 1"] = raised(lambda: autotp.save(model, place))
    result["still"] = files_of(place) == old and sorted(os.listdir(folder)) == ["cwd 0", "cwd 1", "place"]
    os.chdir(folder)
    dist.barrier()
    autotp.save(model, place)
    result["then"] = files_of(place) != old and os.listdir(place.parent) == ["ckpt"]
    result["not parallelized"] = raised(lambda: autotp.save(nn.Linear(2, 2), place))
    model = autotp.parallelize(net(), world, example_inputs=(IDS[:4],), timeout=timedelta(seconds=2))
    start = time.monotonic()
    result["one rank only"] = raised(lambda: autotp.save(model, place)) if rank == 0 else ""
    result["seconds"] = time.monotonic() - start
    dist.barrier()
    model = autotp.parallelize(net(), world, example_inputs=(IDS[:4],), timeout=timedelta(seconds=5))
    result["a save and a call"] = raised((lambda: autotp.save(model, place)) if rank else (lambda: model(IDS[:4])))
    return result


def dying(rank: int, world: int, folder: Path, victim: int, moment: int | float | str) -> Result:
    """A rank dies in the second save; the others' error, and after how many seconds it came."""
    place = folder / "ckpt"
    model = autotp.parallelize(net(), world, example_inputs=(IDS[:4],), timeout=timedelta(seconds=4))
    autotp.save(model, place)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    dist.barrier()
    if rank == victim:
        if moment == "writing":
            os.pwrite = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
        elif isinstance(moment, int):
            kill_at(moment, folder)
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, float(moment))
    start = time.monotonic()
    error = raised(lambda: autotp.save(model, place, max_shard_size="10KB"))
    return {"error": error, "seconds": time.monotonic() - start}
