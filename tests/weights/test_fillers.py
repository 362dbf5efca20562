"""torch's functions that fill parameters, on real processes: shards become parts of what the dense model gets."""

from __future__ import annotations

import pytest

from tests.processes import Ran, results_of
from tests.weights import ranks_fillers

FILLED = (
    "uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_",
    "orthogonal_", "eye_", "constant_", "sparse_", "imported before", "a keyword", "unsplit", "reset_parameters",
    "apply", "vector of what there was", "dense vector",
)  # fmt: skip


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks_fillers.fillers, tmp_path_factory)


@pytest.mark.parametrize("name", FILLED)
def test_all_ranks_hold_parts_of_the_dense_model(filled: Ran, name: str) -> None:
    for result in filled:
        error, moved = result[name]
        assert error < 1e-12
        assert moved > 1e-6, "the function changes the model"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vector of another length", "as many as the dense parameters, and got"),
        ("pruned", "L1Unstructured compares the elements of second.2.weight"),
        ("pruned globally", "CustomFromMask compares the elements of second.0.weight"),
    ],
)
def test_what_a_shard_cannot_tell_is_refused_and_changes_nothing(filled: Ran, name: str, said: str) -> None:
    for result in filled:
        assert said in result[name]
        assert result["refused"] == (pytest.approx(0, abs=1e-12), 0)


def test_a_rank_that_fills_alone_is_found(filled: Ran) -> None:
    assert all("torch.nn.init.normal_ of second.2.weight on rank 1" in result["one rank"] for result in filled)


def test_other_models_are_filled_as_always(filled: Ran) -> None:
    for result in filled:
        assert result["of another model"] == 0
        assert result["another model, pruned"] == 0.5
