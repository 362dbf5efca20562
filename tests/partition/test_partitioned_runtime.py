"""Models that run as parts, on real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import autotp
from tests.partition import ranks
from tests.processes import Ran, results_of, run

pytestmark = pytest.mark.filterwarnings("ignore::autotp.PartialCaptureWarning")


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.around, tmp_path_factory)


def test_parts_on_processes(tmp_path: Path) -> None:
    for result in run(2, ranks.divided, out=tmp_path):
        assert "error" not in result, result["error"]
        assert result["output"] < 1e-12
        assert max(result["gradients"].values()) < 1e-12
        assert len(result["gradients"]) == 16
        assert result["counts"] == result["planned"]
        assert result["held"][0] == result["held"][1]
        assert result["state"]
        assert result["graph"]
        assert "pass one of model.net.embed, " in result["whole"]
        assert result["inside"] < 1e-12
        assert result["same"] == [True, True, True]
        assert result["dropped"]
        assert max(result["checkpointed"]) < 1e-12


DIFFERENCES = {
    "raise": ("error: nothing on rank 0, ValueError: in the middle on rank 1", "ValueError: in the middle"),
    "raise at the end": ("error: nothing on rank 0, ValueError: at the end on rank 1", "ValueError: at the end"),
    "skip": ("what it does: call of second on rank 0, end of the call on rank 1",) * 2,
    "cut": ("args[0]: (3, 5, 64) torch.float64, requires_grad on rank 0, (1, 5, 64)",) * 2,
    "shape": ("args[0]: (3, 5, 64) torch.float64 on rank 0, (2, 5, 64)",) * 2,
    "attribute": ("scale: nothing on rank 0, 9.0 on rank 1",) * 2,
    "mode": ("mode of first.1: train on rank 0, eval on rank 1",) * 2,
    "optimizer": ("steps of optimizers: 1 on rank 0, 2 on rank 1",) * 2,
    "add": ("values of args[0]:",) * 2,
    "double": ("values of result:",) * 2,
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_whose_python_differs_are_found(around: Ran, name: str) -> None:
    for result, said in zip(around, DIFFERENCES[name], strict=True):
        assert said in result[name]
        assert result.get(f"{name}: after", 0.0) < 1e-10


def test_rank_0_s_weights_are_everyones(around: Ran) -> None:
    assert all(result["weights of rank 0"] for result in around)


@pytest.mark.parametrize(
    "name",
    ["as before", "a part by itself", "inside a part", "healed", "dense state", "gradients", "copy before a step",
     "step", "debug", "all raise: after", "all read: after"],
)  # fmt: skip
def test_equals_dense(around: Ran, name: str) -> None:
    assert all(result[name] < 1e-9 for result in around)


def test_norms_copies_and_state(around: Ran) -> None:
    for result in around:
        assert max(*result["norm"], *result["copy"]) < 1e-9
        assert result["full state"]
        assert result["copied graphs"]


def test_hooks_around_parts_run_at_every_call(around: Ran) -> None:
    for result in around:
        error, calls = result["hooks around parts"]
        assert error < 1e-12
        assert calls == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("all raise", "ValueError: in the middle"),
        ("all read", "second.0.weight is split over the ranks, and code outside of the part"),
        ("all read what was assigned", "second.0.weight is split over the ranks, and code outside of the part"),
        ("hook in a part", "second.1 got or lost a forward hook"),
        ("replaced part", "second was replaced"),
        ("replaced by a dense one", "second.0.weight has shape (128, 64), but this rank holds (64, 64)"),
        ("part of a copy", "a part of a parallelized model cannot be copied"),
        ("pickle", "save autotp.full_state_dict(model)"),
    ],
)
def test_what_cannot_be_right_is_an_error(around: Ran, name: str, said: str) -> None:
    assert all(said in result[name] for result in around)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x * 2 if x.sum().item() > 1e9 else x)


def test_the_python_that_runs_is_the_forward_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 64)
    with pytest.warns(autotp.PartialCaptureWarning):
        model = autotp.parallelize(_Branching(), 1, example_inputs=(x,))
    before, own = model(x), _Branching.forward
    monkeypatch.setattr(_Branching, "forward", lambda self, x: own(self, x) + 100)
    torch.testing.assert_close(model(x), before + 100)
