"""Small sums by the kernel of torch's symmetric memory: which go there, and that it is tried before it is trusted.

The kernel needs GPUs that reach each other's memory. Here a stand-in adds up on the CPU, which checks what it is given
as the kernel does; what is tested is all that is around it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotp.distributed.process_context import ProcessContext
from autotp.distributed.symmetric_memory import largest
from autotp.options import Options
from tests import processes
from tests.distributed import ranks_symmetric_memory

SIZE = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.run(SIZE, ranks_symmetric_memory.symmetric, out=tmp_path_factory.mktemp("symmetric"))


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


def test_sums_go_where_the_values_were(results: list[dict[str, Any]]) -> None:
    """Where the kernel can write there, and where the process group does the work."""
    kept = ["small", "matrix", "largest", "bfloat16", "too large", "odd", "double", "needs a gradient"]
    assert [found["in place"] for found in results] == [kept] * SIZE


def test_a_group_shares_memory_once(results: list[dict[str, Any]]) -> None:
    """Memory that ranks have mapped must not become another tensor's."""
    assert all(found["again"] for found in results)


WRONG = ["wrong on one rank", "an error on all", "not offered", "unknown", "another host", "not joined", "no memory",
         "does not meet", "takes nothing", "checksums differ"]  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_where_it_does_not_work_on_one_rank_none_uses_it(results: list[dict[str, Any]], case: str) -> None:
    assert [found[case] for found in results] == [None] * SIZE
    assert all(found["works again"] for found in results)


def test_many_ranks_leave_it_to_the_process_group() -> None:
    assert largest(4) > largest(8) > largest(9) == 0


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize(("backends", "device"), [("nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cuda"), ("nccl", "cpu")])
def test_where_it_stands_among_the_ways(
    asked: bool, backends: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between memory of the host, for CPU tensors, and the process group."""
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda group: backends)
    monkeypatch.setattr(
        "autotp.distributed.process_context.join_symmetric_memory", lambda far, on: ("symmetric", far, on)
    )
    monkeypatch.setattr("autotp.distributed.process_context.join_board", lambda *_: "board")
    monkeypatch.setattr("autotp.distributed.process_context.SharedMemory", lambda board, far, missing: (board, far))
    far: Any = SimpleNamespace(group=None, rank=0, size=2)
    where = torch.device(device)
    mesh: Any = None
    context = ProcessContext(mesh, 0, lambda e: e, Options(symmetric_memory=asked), where)
    found: Any = context._nearest(far)
    expected: Any = ("symmetric", far, where) if asked and device == "cuda" else far
    assert found == (("board", expected) if "gloo" in backends else expected)
