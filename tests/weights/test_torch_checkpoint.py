"""torch's distributed checkpoints and state dict functions of parallelized models, on real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import Ran, results_of
from tests.weights import state_ranks
from tests.weights.state_ranks import RUNS

STAGES = [(2, 0, 0, 2), (3, 2, 2, 4), (1, 3, 6, 3), (4, 1, 9, 3)]
"""For each number of ranks the number before it, the steps done, and those to do: 10 after the first checkpoint."""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Ran]:
    folder = tmp_path_factory.mktemp("stages")
    return {
        world: results_of(world, state_ranks.resumed, tmp_path_factory, folder, source, start, steps)
        for world, source, start, steps in STAGES
    }


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("world", [2, 3, 1, 4])
def test_a_run_goes_on_at_another_tp(stages: dict[int, Ran], name: str, world: int) -> None:
    for result in stages[world]:
        assert result[name] < 1e-9
        assert result[f"plain state of {name}"]
        assert (result[f"shards of {name}"] > 5) == (world > 1)


@pytest.fixture(scope="module")
def apis(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(3, state_ranks.state_apis, tmp_path_factory, Path(tmp_path_factory.mktemp("apis")))


@pytest.mark.parametrize("what", ["full model", "full optimizer", "set full", "set broadcast", "on one rank"])
@pytest.mark.parametrize("name", RUNS)
def test_full_state_dicts_are_the_dense_ones(apis: Ran, name: str, what: str) -> None:
    assert all(result[f"{name}: {what}"] < 1e-9 for result in apis)


@pytest.mark.parametrize("name", RUNS)
def test_an_offloaded_state_dict_is_on_rank_0_only(apis: Ran, name: str) -> None:
    assert all(result[f"{name}: offloaded"] for result in apis)


@pytest.fixture(scope="module")
def axes(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(4, state_ranks.on_two_axes, tmp_path_factory, Path(tmp_path_factory.mktemp("axes")))


@pytest.mark.parametrize("what", ["axes model", "axes wrapped", "async model"])
def test_data_parallel_ranks_write_each_chunk_once(axes: Ran, what: str) -> None:
    assert all(result[what] < 1e-9 for result in axes)


def test_torchs_writer_of_safetensors_is_refused(axes: Ran) -> None:
    """It keeps one chunk of a tensor a rank, and would lose the others of a fused weight."""
    assert all("WeightsError" in result["consolidated"] for result in axes)
    assert all("autotp.save(model, folder)" in result["consolidated"] for result in axes)


def test_shards_without_marks_would_be_one_ranks(axes: Ran) -> None:
    """The control: the same tensors, not marked as shards."""
    assert all("Size mismatch" in result.get("unmarked", "") or result["control"] > 1e-3 for result in axes)
