"""Process groups that only some ranks are in, on real processes."""

from __future__ import annotations

import pytest

from tests.distributed import ranks
from tests.processes import results_of


def test_models_one_after_another_of_which_some_ranks_hold_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ranks that have made different numbers of groups still find each other."""
    results = results_of(3, ranks.replicas, tmp_path_factory)
    for result in results:
        for number in range(3):
            assert result[f"{number}: outputs"] < 1e-12
            assert result[f"{number}: gradients"] < 1e-9
    assert sorted(result["0: groups"] for result in results) == [[1, 3], [2, 3], [2, 3]]
