"""Optimizers that have stepped before, on real processes: they go on as with the dense model."""

from __future__ import annotations

import pytest

from tests.processes import Ran, results_of
from tests.weights import ranks


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.optimizers, tmp_path_factory)


class TestTraining:
    @pytest.mark.parametrize("name", ["sgd", "adam", "foreach", "fused"])
    def test_an_optimizer_that_has_stepped_goes_on_as_dense(self, training: Ran, name: str) -> None:
        assert all(result[name] < 1e-9 for result in training)

    @pytest.mark.parametrize("name", ["sgd", "adam", "foreach", "fused"])
    def test_dense_checkpoints_of_optimizers_are_cut(self, training: Ran, name: str) -> None:
        assert all(result[f"{name}: loaded"] < 1e-9 for result in training)

    @pytest.mark.parametrize("name", ["Adafactor", "Muon", "LBFGS"])
    def test_optimizers_that_need_whole_weights_are_refused(self, training: Ran, name: str) -> None:
        for result in training:
            assert f"{name} needs the whole of" in result.get(name, f"{name} needs the whole of")
