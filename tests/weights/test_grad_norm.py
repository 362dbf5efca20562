"""Norms and clipping of gradients, on real processes: those of the dense model."""

from __future__ import annotations

import pytest
import torch

from tests.processes import Ran, results_of
from tests.weights import ranks


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.norms, tmp_path_factory)


class TestGradientNorms:
    @pytest.mark.parametrize("name", ["replicated", "overlapping", "tied"])
    def test_every_element_of_the_dense_model_counts_once(self, norms: Ran, name: str) -> None:
        for result in norms:
            assert all(e < 1e-12 for e in result[f"{name}: errors"].values()), result[f"{name}: errors"]
            assert result[f"{name}: detached"] < 1e-12
            assert result[f"{name}: some"] < 1e-12
            assert result[f"{name}: same bits"]
            assert result[f"{name}: dtype"] is torch.float64
            assert result[f"{name}: counting shards only"] > 1e-3, "negative control"

    def test_two_models_and_one_that_is_not_parallelized(self, norms: Ran) -> None:
        assert all(result["two models and another"] < 1e-12 for result in norms)

    def test_clipping_scales_as_dense(self, norms: Ran) -> None:
        for result in norms:
            assert max(result["clipped"]) < 1e-10
            assert abs(result["clipped to"] - 0.5) < 1e-6
            assert result["values"] < 1e-10

    def test_what_cannot_be_right_raises_on_every_rank(self, norms: Ran) -> None:
        for result in norms:
            assert "norm_type=0 counts tensors" in result["tied: zero"]
            assert "max_norm: 1.0 on rank 0, 2.0 on rank 1" in result["different max_norm"]
            assert "non-finite" in result["not finite"]
            missing = result["no gradient on rank 1"]
            assert "head.weight: a tensor on rank 0, None on rank 1" in missing

    def test_nothing_to_clip_and_other_models(self, norms: Ran) -> None:
        for result in norms:
            assert result["no gradients"] == 0.0
            assert result["other models"]
