"""Tests of saves that fail or die: the old checkpoint or the new one is there, whole, and all ranks know."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from autotp.saving.staging import Staging
from autotp.verification.processes import free_port, join_as_rank
from tests.processes import Ran, results_of
from tests.saving import ranks_failures
from tests.weights.ranks_data_parallel import net


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks_failures.failures, tmp_path_factory, tmp_path_factory.mktemp("failures"))


def test_troubles(failed: Ran) -> None:
    """Whatever fails on whichever rank, all ranks raise, the old checkpoint is whole, and nothing is left."""
    for name, (victim, _) in ranks_failures.TROUBLES.items():
        for rank, result in enumerate(failed):
            error, whole = result[name]
            assert whole, name
            kinds = ("WeightsError", "ValueError: broken", "KeyboardInterrupt")
            assert error.startswith(kinds if rank == victim else "MismatchError"), (name, error)
            if rank != victim:
                assert f"on rank {victim}" in error, (name, error)
    for name, text in (
        ("disk full at a write of rank 1", "No space left"),
        ("limit of file sizes", "File too large"),
        ("limit of file sizes on rank 1", "File too large"),
        ("Ctrl-C on rank 1", "interrupted"),
        ("rank 1 does not see the folder", "share"),
    ):
        assert all(text in result[name][0] for result in failed) or "Ctrl-C" in name, (name, failed)
    assert "interrupted" in failed[0]["Ctrl-C on rank 1"][0]


def test_differences(failed: Ran) -> None:
    """Ranks that ask for different things are told which; a rank that saves alone is told that the other is missing."""
    for rank, result in enumerate(failed):
        assert "0 ckpt on rank 0" in result["folders differ"]
        assert "1 ckpt on rank 1" in result["folders differ"]
        assert "max_shard_size: 1000 on rank 0, 1001 on rank 1" in result["sizes differ"]
        assert result["no size"].startswith("ValueError")
        assert "cwd 0/ckpt on rank 0" in result["relative"]
        assert "cwd 1/ckpt on rank 1" in result["relative"]
        assert "is a file" in result["file"]
        assert "working directory" in result["working directory of rank 1"]
        assert result["still"]
        assert result["then"]
        assert "not parallelized" in result["not parallelized"]
        assert "MismatchError" in result["a save and a call"]
        assert "what it does" in result["a save and a call"]
        assert result["seconds"] < 10, rank
    assert "rank 1 did not come" in failed[0]["one rank only"]
    assert "save" in failed[0]["one rank only"]


def _forked(rank: int, port: int, out: Path, *args: Any) -> int:
    if (child := os.fork()) == 0:
        join_as_rank(rank, 2, port)
        try:
            result = ranks_failures.dying(rank, 2, *args)
        except BaseException as error:
            result = {"failed": repr(error)}
        (out / f"{rank}.pickle").write_bytes(pickle.dumps(result))
        os._exit(0)
    return child


def _values(folder: Path) -> float | str:
    """What was added to the model's weights before it was saved, if that was the same to all."""
    read = {n: x for path in folder.glob("*.safetensors") for n, x in load_file(path).items()}
    dense = net().state_dict()
    if read.keys() != dense.keys():
        return "some are missing"
    for added in (0.0, 1.0):
        if all(torch.equal(x, dense[n] + added) for n, x in read.items()):
            return added
    return "a mixture"


@pytest.mark.parametrize("victim", [0, 1])
def test_deaths(tmp_path: Path, victim: int) -> None:
    """A rank that dies leaves the old checkpoint or the new one; the other has an error in time."""
    assert not dist.is_initialized()
    found = set()
    for moment in ("writing", 6, 20, 0.01):
        out = tmp_path / str(moment)
        (out / "folder").mkdir(parents=True)
        port = free_port()
        children = [_forked(rank, port, out, out / "folder", victim, moment) for rank in range(2)]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        place = out / "folder" / "ckpt"
        found.add(_values(place))
        result = pickle.loads((out / f"{1 - victim}.pickle").read_bytes())
        if os.WIFSIGNALED(statuses[victim]):
            assert os.WTERMSIG(statuses[victim]) in (signal.SIGKILL, signal.SIGALRM)
            assert "Error" in result["error"] or _values(place) == 1.0, result
            assert result["seconds"] < 12, result
        else:
            assert result["error"] == "nothing raised"
            assert _values(place) == 1.0
        staging = Staging(place)
        staging.create()
        staging.discard()
        assert os.listdir(place.parent) == ["ckpt"]
    assert found in ({0.0}, {0.0, 1.0})
