"""What ranks do together, on threads in place of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from autotp.distributed.mesh import Mesh, describe_differences
from autotp.errors import AutoTPError, CaptureError, MismatchError


class ThreadMesh(Mesh):
    """A rank among threads that gather by a shared list."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(values), None)
        self.values, self.barrier, self.gathers = values, barrier, 0

    def gathered(self, value: Any) -> list[Any]:
        self.gathers += 1
        self.values[self.rank] = value
        self.barrier.wait(10)
        gathered = list(self.values)
        self.barrier.wait(10)
        return gathered


def on_ranks(size: int, work: Callable[[ThreadMesh], Any]) -> tuple[list[Any], list[int]]:
    """What ``work`` returns or raises on each rank, and how often each has gathered."""
    values, barrier = [None] * size, threading.Barrier(size)
    meshes = [ThreadMesh(rank, values, barrier) for rank in range(size)]

    def run(mesh: ThreadMesh) -> Any:
        try:
            return work(mesh)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, meshes)), [mesh.gathers for mesh in meshes]


def attempted(*errors: Exception | None) -> tuple[list[Any], list[int]]:
    """The outcomes of a step that raises one of ``errors`` on each rank, or returns the rank."""

    def work(mesh: ThreadMesh) -> Any:
        def step() -> int:
            if (error := errors[mesh.rank]) is not None:
                raise error
            return mesh.rank

        return mesh.attempt("trying", step)

    return on_ranks(len(errors), work)


class TestAttempt:
    def test_results_where_no_rank_fails(self) -> None:
        outcomes, gathers = attempted(None, None, None)
        assert outcomes == [(0, None), (1, None), (2, None)]
        assert gathers == [2, 2, 2]

    def test_each_rank_s_own_error_where_all_fail(self) -> None:
        errors = [CaptureError("left"), CaptureError("right")]
        outcomes, gathers = attempted(*errors)
        assert outcomes == [(None, errors[0]), (None, errors[1])]
        assert gathers == [2, 2]

    def test_all_raise_where_only_some_fail(self) -> None:
        error = CaptureError("here only")
        (first, second, third), gathers = attempted(None, error, None)
        assert second is error
        for other in (first, third):
            assert type(other) is AutoTPError
            assert str(other) == "trying failed on rank 1: CaptureError: here only"
        assert gathers == [3, 3, 3]

    def test_all_raise_where_one_fails_in_another_way(self) -> None:
        error = ValueError("a bug")
        (first, second), _ = attempted(CaptureError("cannot"), error)
        assert second is error
        assert type(first) is AutoTPError
        assert str(first) == "trying failed on rank 1: ValueError: a bug"

    def test_one_rank_alone(self) -> None:
        error = CaptureError("cannot")
        assert attempted(error)[0] == [(None, error)]
        assert Mesh(0, 1, None).attempt("trying", lambda: "result") == ("result", None)


class TestDifferences:
    def test_none(self) -> None:
        assert describe_differences([{"tp": 2}, {"tp": 2}]) == ""

    def test_each_rank_s_value_and_nothing_where_one_has_none(self) -> None:
        text = describe_differences([{"tp": 2, "same": 1}, {"tp": 4, "same": 1, "mode": "eval"}])
        assert text == "  tp: 2 on rank 0, 4 on rank 1\n  mode: nothing on rank 0, eval on rank 1"

    def test_twelve_lines_and_how_many_more(self) -> None:
        *lines, last = describe_differences([{str(i): r for i in range(15)} for r in range(2)]).splitlines()
        assert len(lines) == 12
        assert last == "  and 3 more"

    def test_ranks_that_do_not_agree_raise_the_same_error(self) -> None:
        outcomes, _ = on_ranks(2, lambda mesh: mesh.agree({"tp": mesh.rank}))
        assert {(type(error), str(error)) for error in outcomes} == {
            (MismatchError, "the ranks must agree, but differ in\n  tp: 0 on rank 0, 1 on rank 1")
        }


@pytest.mark.parametrize("failing", [(), (0,), (1, 2)])
def test_together_raises_on_all_ranks_or_none(failing: tuple[int, ...]) -> None:
    def work(mesh: ThreadMesh) -> str:
        with mesh.together("working"):
            if mesh.rank in failing:
                raise ValueError(f"rank {mesh.rank}")
        return "done"

    outcomes, gathers = on_ranks(3, work)
    assert gathers == [1, 1, 1]
    for rank, outcome in enumerate(outcomes):
        if not failing:
            assert outcome == "done"
        elif rank in failing:
            assert str(outcome) == f"rank {rank}"
        else:
            assert str(outcome) == f"working failed on rank {failing[0]}: ValueError: rank {failing[0]}"
