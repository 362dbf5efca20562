"""Dropout on real processes: the same on replicated values, each rank's own on shards, whatever the seeds."""

from __future__ import annotations

import pytest

from tests.distributed import ranks
from tests.processes import Ran, results_of


@pytest.fixture(scope="module")
def dropout(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.random_state, tmp_path_factory)


def test_dropout_eval_and_dtypes(dropout: Ran) -> None:
    for result in dropout:
        assert result["dropout agrees"]
        assert result["dropout drops"]
        assert result["eval is steady"]
        assert result["bfloat16"]
        assert result["bfloat16 close"] < 0.05


class TestTraining:
    def test_20_steps_with_dropout_from_different_seeds(self, dropout: Ran) -> None:
        for result in dropout:
            assert result["dropping"]
            assert result["outputs agree"]
            assert result["whole parameters agree"]
            assert result["shards differ"], "negative control"

    def test_whole_values_drop_the_same_and_shards_their_own(self, dropout: Ran) -> None:
        assert all(result["shared"] and not result["own"] for result in dropout)
