"""Optimizers on real processes: they go on as with the dense model, or are refused."""

from __future__ import annotations

import pytest

from tests.processes import Ran, results_of
from tests.weights import optimizer_ranks, ranks
from tests.weights.optimizers import ELEMENTWISE, READERS


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


@pytest.fixture(scope="module", params=[2, 3])
def tried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(request.param, optimizer_ranks.tried_out, tmp_path_factory)


class TestTriedOut:
    def test_elementwise_ones_train_as_dense(self, tried: Ran) -> None:
        for result in tried:
            for name in [*ELEMENTWISE, "ZeroRedundancyOptimizer"]:
                assert result[name] < 1e-9, name
            assert not result["warnings"]

    def test_those_that_read_matrices_are_refused_on_every_rank(self, tried: Ran) -> None:
        for name in READERS.keys() - optimizer_ranks.NEED_CLOSURES:
            assert len({result[name] for result in tried}) == 1
            message = tried[0][name]
            assert message.startswith("AutoTPError: "), (name, message)
            assert "needs the whole of dim 0 of up.weight" in message
            assert "tried out on a small parameter" in message
            assert "use an optimizer that works element by element" in message

    def test_let_through_they_train_another_model(self, tried: Ran) -> None:
        for result in tried:
            for name in ("Lamb", "transformers' Adafactor", "Clipping small ones"):
                assert result[f"{name}: let through"] > 1e-4, f"negative control: {name}"

    def test_only_the_dims_that_are_cut_matter(self, tried: Ran) -> None:
        for result in tried:
            assert (
                result["of unsplit ones"]
                == result["by rows, of rows"]
                == result["not parallelized"]
                == "nothing raised"
            )
            assert "ByRows needs the whole of dim 1 of down.weight" in result["by rows, of columns"]
            assert "Adafactor needs the whole of dim 0 of up.bias" in result["of biases"]

    def test_they_are_tried_out_once_for_each_kind_of_options(self, tried: Ran) -> None:
        for result in tried:  # a matrix and a bias; an option that becomes 0 is of another kind, a rate is not
            assert result["times"] == [2, 2, 2, 2, 4, 4]
            assert "Lamb needs the whole of" in result["changed options"]
            assert result["changed options"] == result["and once more"]
            assert result["another group"] == "nothing raised"

    def test_those_that_cannot_be_tried_out_warn_once(self, tried: Ran) -> None:
        for result in tried:
            for name, why in {"picky": "ValueError: a tensor that I do not know", "collective": "c10d::"}.items():
                errors, (message,) = result[name]
                assert errors == ["nothing raised"] * 2
                assert "could not be tried out" in message
                assert why in message
            errors, messages = result["picky muon"]
            assert all("PickyMuon needs the whole of up.weight" in error for error in errors)
            assert "could not be tried out: ValueError" in errors[0]
            assert not messages
            assert result["dense"] == "nothing raised"
