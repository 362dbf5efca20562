"""State dicts that know of which dense tensors they have shards."""

from __future__ import annotations

import pytest
import torch

from autotp.weights.shard_tensor import Sharding, ShardTensor
from passes import IndexSet, Shards
from tests.processes import Ran, results_of
from tests.weights import state_ranks

OVERLAPPING = Shards(10, (IndexSet(((0, 4), (6, 8))), IndexSet(((2, 4), (4, 6))), IndexSet(((6, 10),))))


def test_chunks_cover_the_dense_tensor_once() -> None:
    """What ranks write are chunks that no two of them hold; what they read is all that they hold."""
    dense = torch.arange(30.0).view(10, 3)
    again = torch.full((10, 3), torch.nan)
    for rank, indices in enumerate(OVERLAPPING.ranks):
        local = dense[torch.from_numpy(indices.indices)]
        shard = ShardTensor.of(local, Sharding(rank, 0, OVERLAPPING))
        for item in shard.__create_write_items__("w", shard):
            assert item.tensor_data is not None
            assert item.tensor_data.size == dense.shape
            (a, _), (n, _) = item.tensor_data.chunk.offsets, item.tensor_data.chunk.sizes
            assert again[a : a + n].isnan().all()
            again[a : a + n] = shard.__get_tensor_shard__(item.index)
        held = [(c.offsets[0], c.offsets[0] + c.sizes[0]) for c in shard.__create_chunk_list__()]
        assert sorted(i for a, b in held for i in range(a, b)) == list(indices.indices)
        for a, b in held:
            index = type(item.index)("w", torch.Size([a, 0]))
            assert torch.equal(shard.__get_tensor_shard__(index), dense[a:b])
    assert torch.equal(again, dense)


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, state_ranks.marks, tmp_path_factory, tmp_path_factory.mktemp("marks"))


def test_a_shard_is_a_plain_tensor_to_ordinary_code(marks: Ran) -> None:
    for result in marks:
        assert result["memory"]
        assert result["shape"]
        assert result["plain results"] == {torch.Tensor}
        assert result["copies"] == {ShardTensor}
        assert result["inner"]
        assert result["outer"]


def test_another_ranks_shards_are_refused_and_both_are_named(marks: Ran) -> None:
    for rank, result in enumerate(marks):
        assert result["loaded own"] == "<All keys matched successfully>"
        other = result["loaded other's"]
        assert f"that of rank {1 - rank} of tp=2" in other
        assert f"this is rank {rank} of tp=2" in other
        assert f"that of rank {1 - rank} of tp=2" in result["loaded other's optimizer"]
        assert f"that of rank {rank} of tp=2" in result["another tp"]
        assert "this is unsplit here" in result["another tp"]
        assert result["as before"]
        assert result["after loading"] < 1e-9


def test_pickling_warns_once(marks: Ran) -> None:
    for rank, result in enumerate(marks):
        (warning,) = result["warnings"]
        assert warning.startswith("LocalStateWarning")
        assert "autotp.save(model, folder)" in warning
        assert f"rank {rank} of tp=2" in warning


@pytest.mark.parametrize("how", ["save_file", "copies in save_file", "save_model", "parameters in save_file"])
def test_safetensors_refuses_shards(marks: Ran, how: str) -> None:
    for result in marks:
        assert result[how].startswith("WeightsError")
        assert "autotp.save(model, folder)" in result[how]
        assert result["nothing written"]
    assert marks[0]["unsplit"]
