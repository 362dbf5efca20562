"""State dicts that a parallelized model loads, on real processes: dense ones, its own, and parts of them."""

from __future__ import annotations

import pytest

from tests.processes import Ran, results_of
from tests.weights import ranks


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.state_dicts, tmp_path_factory)


class TestChangesAfterParallelize:
    @pytest.mark.parametrize(
        "name",
        ["dense state", "and back", "local state", "untouched", "partial state", "prefixed state", "assigned state"],
    )
    def test_the_graph_sees_it(self, states: Ran, name: str) -> None:
        assert all(result[name] < 1e-12 for result in states)

    def test_wrong_state_is_torchs_error_and_names_both_shapes(self, states: Ran) -> None:
        for result in states:
            wrong = result["wrong state"]
            assert wrong.startswith("RuntimeError: Error(s) in loading state_dict for Scaled")
            assert wrong.count("size mismatch") == 1
            assert "dense model is torch.Size([128, 64]), this rank's shard of it is torch.Size([64, 64])" in wrong
            assert "Missing key(s)" in result["missing keys"]

    def test_loading_keeps_shares(self, states: Ran) -> None:
        for result in states:
            assert result["assigned shapes"] == [(64, 64), (64,), (64, 64), (64,)]
            assert result["full state"]
