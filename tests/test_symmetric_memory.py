"""Small sums by the kernel of torch's symmetric memory: which go there, and that it is tried before it is trusted.

The kernel needs GPUs that reach each other's memory. Here a stand-in adds up on the CPU, which checks what it is given
as the kernel does; what is tested is all that is around it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotp.symmetric_memory import largest
from tests import workers, workers_memory

SIZE = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return workers.run(SIZE, workers_memory.symmetric, out=tmp_path_factory.mktemp("symmetric"))


def test_sums_are_those_of_the_process_group(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["worst"] < 1e-6
        assert found["same bits"]


def test_dtype_and_size_say_which_go_by_the_kernel(results: list[dict[str, Any]]) -> None:
    """Where a tensor lies in a rank's memory must not: the ranks could choose differently, and wait for ever."""
    taken = ["small", "matrix", "turned", "not aligned", "largest", "bfloat16", "needs a gradient"]
    assert [found["by kernel"] for found in results] == [taken] * SIZE


def test_each_dtype_has_a_buffer_of_the_largest_size(results: list[dict[str, Any]]) -> None:
    wanted = [(torch.float32, largest(SIZE) // 4), (torch.bfloat16, largest(SIZE) // 2)]
    assert [found["buffers"] for found in results] == [wanted] * SIZE


def test_both_ways_are_counted_once(results: list[dict[str, Any]]) -> None:
    assert [found["tally"] for found in results] == [{"all_reduce": 2}] * SIZE


@pytest.mark.parametrize("case", ["wrong", "refused on one rank", "not offered on one rank"])
def test_where_it_does_not_work_on_one_rank_none_uses_it(results: list[dict[str, Any]], case: str) -> None:
    assert [found[case] for found in results] == [None] * SIZE


def test_many_ranks_leave_it_to_the_process_group() -> None:
    assert largest(4) > largest(8) > largest(9) == 0
