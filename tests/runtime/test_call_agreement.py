"""Calls that differ between ranks, on real processes: each rank raises, and says who differs in what."""

from __future__ import annotations

import pytest

from tests.processes import Ran, results_of
from tests.runtime import ranks


@pytest.fixture(scope="module")
def agreement(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.agreement, tmp_path_factory)


DIFFERENCES = {
    "shape": "args[0]: (3, 5, 64) torch.float64 on rank 0, (2, 5, 64)",
    "dtype": "(3, 5, 64) torch.float64 on rank 0, (3, 5, 64) torch.float32 on rank 1",
    "structure": "kwargs['x']: (3, 5, 64) torch.float64 on rank 0",
    "constant": "kwargs['flag']: False on rank 0, True on rank 1",
    "argument": "kwargs['down']: nothing on rank 0",
    "input that needs a gradient": "(3, 5, 64) torch.float64, requires_grad on rank 1",
    "mode": "mode of the model: eval on rank 0, train on rank 1",
    "mode of a submodule": "mode of drop: eval on rank 0, train on rank 1",
    "gradients disabled": "gradients: enabled on rank 0, disabled on rank 1",
    "frozen": "parameter second.0.weight: torch.float64, requires_grad on rank 0",
    "attribute": "scale: nothing on rank 0, 9.0 on rank 1",
    "optimizer": "steps of optimizers: 0 on rank 0, 1 on rank 1",
    "other step": "what it does: call on rank 0, full_state_dict on rank 1",
    "debug: values": "values of args[0]:",
    "debug: weights": "values of parameter second.2.bias:",
}


class TestRanksThatDiffer:
    @pytest.mark.parametrize("name", DIFFERENCES)
    def test_every_rank_raises_and_says_who_differs_in_what(self, agreement: Ran, name: str) -> None:
        for result in agreement:
            assert result[name].startswith("MismatchError: step ")
            assert DIFFERENCES[name] in result[name]

    @pytest.mark.parametrize("name", DIFFERENCES)
    def test_then_all_can_go_on(self, agreement: Ran, name: str) -> None:
        for result in agreement:
            assert result.get(f"{name}: after", 0.0) < 1e-10

    def test_a_rank_that_raises_lets_the_others_know(self, agreement: Ran) -> None:
        assert agreement[1]["hook"].startswith("AutoTPError: drop got or lost a forward hook")
        for result in agreement[:1]:
            assert "error: nothing on rank 0, AutoTPError: drop got or lost" in result["hook"]

    def test_a_fused_optimizer_under_a_scaler_is_refused(self, agreement: Ran) -> None:
        assert all("train in bfloat16" in result["scaler"] for result in agreement)

    def test_equal_calls_pass(self, agreement: Ran) -> None:
        assert all(result["as before"] < 1e-10 and result["debug"] < 1e-10 for result in agreement)
