"""Ranks that parallelize differently, or do not come, on real processes: an error on each of them."""

from __future__ import annotations

import pytest

from tests.distributed import ranks
from tests.processes import Ran, results_of


@pytest.fixture(scope="module")
def agreement(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.agreement, tmp_path_factory)


class TestRanksThatDiffer:
    def test_a_rank_that_stays_away_is_named_in_time(self, agreement: Ran) -> None:
        assert agreement[1]["fewer calls"] == "stayed away"
        for result in agreement[:1]:
            assert "call: rank 1 did not come within 4 s" in result["fewer calls"]

    def test_a_rank_that_calls_no_backward_is_found(self, agreement: Ran) -> None:
        for result in agreement:
            assert result["no backward"].startswith("MismatchError: step")
            assert "did not come within 4 s" in result["no backward"]


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("different tp", "MismatchError", "tp: 1 on rank 0, 2 on rank 1"),
        ("different models", "MismatchError", "wte.weight"),
        ("different inputs", "MismatchError", "(2, 16) torch.int64 on rank 0"),
        ("different structure", "MismatchError", "structure of the inputs"),
        ("strict on one", "MismatchError", "strict: True on rank 0, False on rank 1"),
    ],
)
def test_what_is_wrong_is_an_error_on_every_rank(agreement: Ran, what: str, kind: str, says: str) -> None:
    for result in agreement:
        assert result[what].startswith(kind + ":")
        assert says in result[what]


def test_a_failure_on_one_rank_is_raised_on_all(agreement: Ran) -> None:
    assert "ZeroDivisionError" in agreement[1]["one rank fails"]
    assert "on rank 1" in agreement[0]["one rank fails"]
    assert "only here" in agreement[0]["one rank fails"]
