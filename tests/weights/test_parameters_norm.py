"""The norm of a model's parameters as a part of the loss: on real processes that of the dense model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autotp
from tests.processes import Ran, results_of
from tests.weights import parameters_norm_ranks

MODELS = ["replicated", "overlapping", "heads for two ranks", "tied"]


@pytest.fixture(scope="module", params=[2, 3])
def norms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(request.param, parameters_norm_ranks.parameters_norms, tmp_path_factory)


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_every_element_of_the_dense_model_counts_once(self, norms: Ran, name: str) -> None:
        for result in norms:
            assert all(e < 1e-12 for e in result[f"{name}: norms"].values()), result[f"{name}: norms"]
            assert result[f"{name}: same bits"]

    def test_gradients_are_the_dense_models(self, norms: Ran, name: str) -> None:
        for result in norms:
            assert all(e < 1e-9 for e in result[f"{name}: gradients"].values()), result[f"{name}: gradients"]

    def test_a_norm_of_a_ranks_own_tensors_would_be_another(self, norms: Ran, name: str) -> None:
        for result in norms:
            assert result[f"{name}: splits"]
            assert min(result[f"{name}: by hand"]) > 1e-3, "negative control"


class TestParameters:
    def test_some_parameters_parts_and_none(self, norms: Ran) -> None:
        for result in norms:
            assert max(result["some"]) < 1e-12

    def test_two_models_and_one_that_is_not_parallelized(self, norms: Ran) -> None:
        for result in norms:
            assert result["two models and another"] < 1e-12
            assert result["gradient of another"] < 1e-12

    def test_half_precision_is_rounded_once(self, norms: Ran) -> None:
        for result in norms:
            assert result["half"]["norm"]
            assert result["half"]["dtype"] is torch.bfloat16
            assert result["half"]["gradient"] < 0.01


def test_what_cannot_be_right_raises_on_every_rank(norms: Ran) -> None:
    for result in norms:
        wrong = result["wrong"]
        assert "MismatchError" in wrong["another power"]
        assert "norm_type: 2.0 on rank 0, 3.0 on rank 1" in wrong["another power"]
        assert (
            "parameters: ['head.weight'] on rank 0, ['head.weight', 'out.weight'] on rank 1"
            in wrong["other parameters"]
        )
        assert "norm_type must be a positive number or inf, not 0" in wrong["zero"]
        assert "not -inf" in wrong["negative"]
        assert "AutoTPError: a second derivative" in wrong["second derivative"]
        assert result["then"] < 1e-12


class TestDense:
    """Models that are not parallelized: as torch."""

    @pytest.mark.parametrize("power", [0.5, 1, 2.0, 3, "inf"])
    def test_norm_and_gradient(self, power: float | str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
        tensors = list(model.parameters())
        expected = torch.linalg.vector_norm(torch.cat([p.flatten() for p in tensors]), float(power))
        norm = autotp.parameters_norm(model, power)
        torch.testing.assert_close(norm, expected)
        for found, wanted in zip(*(torch.autograd.grad(x, tensors, allow_unused=True) for x in (norm, expected))):
            torch.testing.assert_close(found, wanted)

    def test_shared_parameters_count_once(self) -> None:
        layer = nn.Linear(3, 3)
        expected = torch.linalg.vector_norm(torch.cat([p.flatten() for p in layer.parameters()]))
        torch.testing.assert_close(autotp.parameters_norm(nn.ModuleList([layer, layer])), expected)
        torch.testing.assert_close(autotp.parameters_norm([*layer.parameters()] * 2), expected)

    def test_no_parameters(self) -> None:
        assert torch.equal(autotp.parameters_norm(nn.ReLU()), torch.tensor(0.0))

    @pytest.mark.parametrize("power", [0, -1.0, float("-inf"), float("nan")])
    def test_exponents_that_are_not_positive_are_refused_as_on_shards(self, power: float) -> None:
        with pytest.raises(autotp.AutoTPError, match="must be a positive number or inf"):
            autotp.parameters_norm(nn.Linear(2, 2), power)
