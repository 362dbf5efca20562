"""Data parallelism around a parallelized model, on real processes: exact over the right ranks, else an error."""

from __future__ import annotations

from typing import Any

import pytest

from tests.processes import Ran, results_of
from tests.weights import ranks_data_parallel

RIGHT = [
    "DistributedDataParallel", "bucket view", "device mesh", "tensor-parallel mesh", "ZeroRedundancyOptimizer",
    "fully_shard", "replicate", "a model around it", "a submodule of it",
]  # fmt: skip
NAMES = {
    "without synchronization": "DistributedDataParallel",
    "a submodule": "DistributedDataParallel",
    "a model around it": "DistributedDataParallel",
    "fully_shard of a block": "fully_shard",
    "parameter groups": "ZeroRedundancyOptimizer",
    "all_reduce": "all_reduce of the gradient of blocks.0.0.weight",
    "broadcast": "broadcast of blocks.0.0.weight",
    "hybrid": "FullyShardedDataParallel",
    "replicate by DDP": "DistributedDataParallel",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(4, ranks_data_parallel.everything, tmp_path_factory)


def _of(ran: Ran, work: str) -> list[dict[Any, Any]]:
    return [result[work] for result in ran]


class TestOverTheSameShards:
    @pytest.mark.parametrize("name", RIGHT)
    def test_training_is_that_of_the_joint_batch(self, ran: Ran, name: str) -> None:
        for result in _of(ran, "exact"):
            assert result[name] < 1e-9
            assert result["control: no wrapper"] > 1e-2, "negative control"

    def test_a_submodule_of_a_sharded_model_says_what_to_call(self, ran: Ran) -> None:
        for result in _of(ran, "exact"):
            assert "has become a DTensor since autotp.parallelize" in result["a submodule of it by itself"]


class TestOverDifferentShards:
    def test_every_wrapper_is_refused_on_every_rank(self, ran: Ran) -> None:
        cases = {(where, name) for where, name, *_ in filter(lambda key: isinstance(key, tuple), ran[0]["refused"])}
        assert len(cases) > 25
        for rank, result in enumerate(_of(ran, "refused")):
            for where, name in cases - {("all", "DataParallel")}:
                over = "0, 1, 2, 3" if where == "all" else "0, 1" if rank < 2 else "2, 3"
                wanted = f"AutoTPError: {NAMES.get(name, name)} over ranks {over} would mix different shards"
                assert wanted in result[where, name]
                assert f"hold the same shard as this one, ranks {rank % 2}, {rank % 2 + 2}: " in result[where, name]

    def test_the_model_stays_as_it_was(self, ran: Ran) -> None:
        for result in _of(ran, "refused"):
            assert not [key for key, value in result.items() if key[-1] == "unchanged" and not value]

    def test_the_message_says_what_to_pass(self, ran: Ran) -> None:
        for result in _of(ran, "refused"):
            ending = 'mesh = init_device_mesh(device_type, (2, 2), mesh_dim_names=("dp", "tp"))'
            assert result["all", "DistributedDataParallel"].endswith(ending)
            group = 'process_group=mesh["dp"].get_group())'
            assert f"DistributedDataParallel(model, {group}" in result["all", "DistributedDataParallel"]
            assert f"ZeroRedundancyOptimizer(model.parameters(), ..., {group}" in result["tp", "parameter groups"]
            assert 'fully_shard(model, mesh=mesh["dp"])' in result["all", "fully_shard of a block"]
            assert 'replicate(model, mesh=mesh["dp"])' in result["all", "replicate"]
            assert "leave DataParallel out" in result["all", "DataParallel"]

    def test_ranks_of_different_models_are_asked(self, ran: Ran) -> None:
        for rank, result in enumerate(_of(ran, "refused")):
            over = "1, 2" if rank in (1, 2) else "0, 3"
            assert f"DistributedDataParallel over ranks {over} would mix different shards" in result["crossed"]

    def test_copies_and_models_among_others(self, ran: Ran) -> None:
        for result in _of(ran, "refused"):
            assert "would mix different shards" in result["a copy"]
            assert "would mix different shards" in result["two models"]
            assert "leave it out, the model trains on all of them as it is" in result["all ranks"]
            assert "no_such_argument" in result["wrong arguments"]

    @pytest.mark.parametrize("name", ["DistributedDataParallel", "ZeroRedundancyOptimizer"])
    def test_what_was_wrapped_before(self, ran: Ran, name: str) -> None:
        for result in _of(ran, "refused"):
            assert result[f"before: {name}"].startswith(f"AutoTPError: a {name} was made around this Net")
            assert result["before: garbage"] == "nothing raised", "negative control"


@pytest.mark.parametrize(
    "name",
    ["another model", "unsplit parameters", "one rank", "a group of one rank", "all_reduce of a norm",
     "all_reduce of a copy", "no model"],
)  # fmt: skip
def test_what_is_right_goes_on(ran: Ran, name: str) -> None:
    assert [result[name] for result in _of(ran, "allowed")] == ["nothing raised"] * 4


class TestLibraries:
    @pytest.mark.parametrize("name", ["prepare", "Trainer"])
    def test_what_they_wrap_by_themselves_is_refused(self, ran: Ran, name: str) -> None:
        for result in _of(ran, "accelerated"):
            assert "AutoTPError: DistributedDataParallel over ranks 0, 1, 2, 3 would mix" in result[name]
            assert "accelerator.prepare_model(model, evaluation_mode=True)" in result[name]

    def test_accelerate_without_its_wrapper_is_exact(self, ran: Ran) -> None:
        assert all(result["prepared without a wrapper"] < 1e-9 for result in _of(ran, "accelerated"))
