"""Dense against parallel on real gloo processes, two and four of them: one spawn for all cases."""

from __future__ import annotations

from typing import Any

import pytest

from tests import processes
from tests.end_to_end import ranks
from tests.models import CASES


@pytest.fixture(scope="module", params=[2, 4])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]]]:
    world = request.param
    return world, processes.run(world, ranks.correctness, list(CASES), out=tmp_path_factory.mktemp(f"ranks{world}"))


def _each(ran: tuple[int, list[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    for rank, result in enumerate(ran[1]):
        assert "error" not in result, f"rank {rank}:\n{result.get('error')}"
    return [result[name] for result in ran[1]]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_every_gradient(ran: Any, name: str) -> None:
    for result in _each(ran, name):
        assert all(e < 1e-10 for errors in result["outputs"].values() for e in errors), result["outputs"]
        wrong = {n: e for n, e in result["gradients"].items() if not e < 1e-10}
        assert not wrong
        assert len(result["gradients"]) > 5


@pytest.mark.parametrize("name", CASES)
def test_hidden_values_are_bit_equal_on_all_ranks(ran: Any, name: str) -> None:
    for result in _each(ran, name):
        assert result["hidden"] > 3
        assert result["apart"] == []


@pytest.mark.parametrize("name", CASES)
def test_ranks_hold_their_share_of_rank_0s_weights(ran: Any, name: str) -> None:
    for result in _each(ran, name):
        assert result["state"], "full_state_dict is not rank 0's dense state dict"
        assert result["held"] == result["planned"]
        assert result["stored"] == result["planned"], "the dense weight is kept beside its shard"
        assert result["type"]


@pytest.mark.parametrize("name", CASES)
def test_collectives_are_those_planned(ran: Any, name: str) -> None:
    for result in _each(ran, name):
        forward, _, backward, _ = result["counts"]
        assert (sum(forward.values()), sum(backward.values())) == result["planned_counts"]


def test_tutorial_network_costs_one_all_reduce_for_attention_and_one_for_the_mlp(ran: Any) -> None:
    for result in _each(ran, "tutorial"):
        forward, elements, backward, back_elements = result["counts"]
        assert forward == {"all_reduce": 2}
        assert elements["all_reduce"] == 2 * 2 * 16 * 1024
        assert backward == {"all_reduce": 1}  # the MLP's; attention's would be for the input, which needs no gradient
        assert back_elements["all_reduce"] == 2 * 16 * 1024


def test_tp_smaller_than_the_world_makes_groups_of_consecutive_ranks(ran: Any) -> None:
    world, results = ran
    if world == 2:
        pytest.skip("needs four processes")
    for rank, result in enumerate(results):
        error, words = result["groups"]
        assert error < 1e-10
        assert words == (501, 500)[rank % 2]
