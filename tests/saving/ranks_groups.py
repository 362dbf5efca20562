"""Work on real processes: groups of ranks that hold the same model, or different ones."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.saving import write_checkpoint
from tests.comparison import raised
from tests.saving.ranks_failures import full
from tests.weights.ranks_data_parallel import IDS, net

Result = dict[str, Any]
TIMEOUT = timedelta(seconds=4)


def _equal(folder: Path, added: float) -> bool:
    """Whether a folder holds the model with a number added to each weight."""
    read = load_file(folder / "model.safetensors")
    return all(torch.equal(x + added, read[n]) for n, x in net().state_dict().items())


def _add(model: nn.Module, added: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += added


def groups(rank: int, world: int, folder: Path, how: str) -> Result:
    """Two groups of two ranks save the same model: all, the first alone, the second alone, with a failure."""
    result: Result = {}
    options: dict[str, Any] = {"timeout": TIMEOUT}
    if how == "mesh":
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    model = autotp.parallelize(net(), 2, example_inputs=(IDS[:4],), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    patient = dist.new_group(timeout=timedelta(seconds=60))
    is_first = rank < 2
    place = folder / how
    time.sleep(0.5 if is_first else 0)  # the second group waits
    autotp.save(model, place / "ckpt")
    result["all"] = _equal(place / "ckpt", 0)
    dist.barrier(patient)
    time.sleep(0 if is_first else 0.5)  # the second group comes late
    autotp.save(model, place / "ckpt")
    result["again"] = _equal(place / "ckpt", 0)
    dist.barrier(patient)
    if is_first:
        autotp.save(model, place / "ckpt")
    dist.barrier(patient)
    _add(model, 1)
    optimizer.step()
    time.sleep(0.5 if is_first else 0)
    autotp.save(model, place / "ckpt")
    result["after the first group alone"] = _equal(place / "ckpt", 1)
    dist.barrier(patient)
    patch = mock.patch.object(write_checkpoint, "write_shard", full if is_first else write_checkpoint.write_shard)
    with patch:
        result["failure"] = raised(lambda: autotp.save(model, place / "ckpt"))
    dist.barrier(patient)
    result["as it was"] = _equal(place / "ckpt", 1)
    start = time.monotonic()
    result["second alone"] = "" if is_first else raised(lambda: autotp.save(model, place / "alone"))
    result["seconds"] = time.monotonic() - start
    dist.barrier(patient)
    with mock.patch.object(write_checkpoint, "_allocate", _slow(write_checkpoint._allocate)):
        autotp.save(model, place / "slow", max_shard_size="5KB")
    result["slow"] = (place / "slow" / "model.safetensors.index.json").exists()
    dist.barrier(patient)
    other = net() if is_first else nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = IDS[:4] if is_first else torch.randn(3, 8)
    other = autotp.parallelize(other, 2, example_inputs=(x,), **options)
    autotp.save(other, place / ("one" if is_first else "two"))
    dist.barrier(patient)
    result["different models"] = [len(load_file(place / n / "model.safetensors")) for n in ("one", "two")]
    return result


def _slow(function: Any) -> Any:
    """A function that takes its time, though less than the timeout."""

    def slow(*args: Any) -> Any:
        time.sleep(1.0)
        return function(*args)

    return slow
