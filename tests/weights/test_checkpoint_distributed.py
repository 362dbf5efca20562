"""Folders that torch.distributed.checkpoint wrote on several ranks, loaded on as many."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from autotp.errors import WeightsError
from autotp.weights import tensor_source
from autotp.weights.checkpoint import open_checkpoint
from autotp.weights.distributed_checkpoint import TrainingState
from autotp.weights.load_checkpoint import match_checkpoint, read_shards
from autotp.weights.slicing import local_part
from autotp.weights.tensor_source import Reader
from passes import IndexSet, Shards
from tests.processes import Ran, results_of
from tests.weights import ranks_checkpoint

WAYS = ("under model", "plain", "hf parts", "hf joined")


@pytest.fixture(scope="module", params=[2, 3])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("states")
    return results_of(request.param, ranks_checkpoint.training_states, tmp_path_factory, folder)


def test_training_states_give_each_rank_its_share_and_no_more(loaded: Ran) -> None:
    for result in loaded:
        for dtype in (torch.float64, torch.bfloat16):
            for way in WAYS:
                found = result[f"{way} {dtype}"]
                assert found["equal"], way
                assert found["apart"] < (1e-10 if dtype is torch.float64 else 0.1), way
                assert 1 <= found["read"] <= 1.15, way  # bytes between short rows, and first elements
                assert found["share"] < 0.7
            assert not result[f"control {dtype}"]["equal"], "negative control"


class Both(nn.Module):
    """Its names with and without ``model.`` in front are names of a training state."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = nn.Linear(2, 2), nn.Linear(2, 2)


def _saved(state: dict[str, object], path: Path) -> Path:
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def _read(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    return read_shards(model, match_checkpoint(model, open_checkpoint(path)), {}, 0, None)


def test_the_models_names_decide(tmp_path: Path) -> None:
    model = Both()
    plain, below = ({n: torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(2))
    both = {**plain, **{f"model.{n}": t for n, t in below.items()}}
    for name, state, expected in (("plain", plain, plain), ("below", {"model": below, "optim": plain}, below)):
        found = _read(model, _saved(dict(state), tmp_path / name))
        assert all(torch.equal(found[n], t) for n, t in expected.items()), name
    inner = nn.Linear(2, 2)
    assert torch.equal(
        _read(inner, _saved({"model": inner.state_dict(), "weight2": plain}, tmp_path / "in"))["weight"], inner.weight
    )
    assert isinstance(open_checkpoint(_saved(both, tmp_path / "both")), TrainingState)


def test_what_is_not_the_models_is_left_out_but_its_own_layers_are_not(tmp_path: Path) -> None:
    model = Both()
    state = {**model.state_dict(), "optim.exp_avg": torch.ones(1), "step": 3}
    assert set(_read(model, _saved(state, tmp_path / "a"))) == set(model.state_dict())
    with pytest.raises(WeightsError, match=r"unexpected: head\.more"):
        _read(model, _saved({**state, "head.more": torch.ones(1)}, tmp_path / "b"))
    with pytest.raises(WeightsError, match=r"missing: head\.bias"):
        _read(model, _saved({n: t for n, t in state.items() if n != "head.bias"}, tmp_path / "c"))


def test_only_the_description_and_the_parts_that_are_needed_are_read(tmp_path: Path) -> None:
    """Of a part that nobody needs nothing is read, not even where in its file it lies."""
    model = nn.Linear(2, 2)
    path = _saved({"model": model.state_dict(), "optim": {"weight": torch.ones(4)}}, tmp_path / "a")
    sources = open_checkpoint(path)
    _read(model, path)
    match_checkpoint(model, sources)
    assert all(c._located is None for s in sources.values() for c in s.chunks)  # type: ignore[attr-defined]
    read_shards(model, match_checkpoint(model, sources), {}, 0, None)
    located = {n for n, s in sources.items() for c in s.chunks if c._located is not None}  # type: ignore[attr-defined]
    assert located == {"model.weight", "model.bias"}


def _tiles(tensor: torch.Tensor, rows: list[int], columns: list[int]) -> list[tuple[torch.Tensor, list[int]]]:
    """A matrix in tiles, each with the index of its first element."""
    spans = itertools.product(itertools.pairwise(rows), itertools.pairwise(columns))
    return [(tensor[a:b, c:d].contiguous(), [a, c]) for (a, b), (c, d) in spans]


def _save_tiles(folder: Path, tiles: list[tuple[torch.Tensor, list[int]]]) -> Path:
    """Each in a file, as HuggingFaceStorageWriter writes them."""
    from safetensors.torch import save_file

    folder.mkdir()
    for i, (tile, at) in enumerate(tiles):
        told = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": at}})}
        save_file({"w": tile}, folder / f"shard-{i}-model.safetensors", metadata=told)
    return folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_any_part_of_a_tensor_in_tiles(
    dtype: torch.dtype, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_source, "PIECE", piece)
    whole = torch.randn(7, 9).to(dtype)
    source = open_checkpoint(_save_tiles(tmp_path / "a", _tiles(whole, [0, 1, 5, 7], [0, 4, 9])))["w"]
    assert source.shape == (7, 9)
    with Reader() as reader:
        for dim, a, b, c in [
            (-1, 0, 0, 0),
            *((d, a, b, c) for d in (0, 1) for a, b, c in ((0, 2, 6), (1, 5, 5), (3, 4, 4))),
        ]:
            size = (7, 9)[dim]
            shards = {dim: Shards(size, (IndexSet(((a, b), (c, size))),))} if dim >= 0 else {}
            wanted = local_part(whole, shards, 0)
            for out in (torch.zeros_like(wanted), torch.zeros(wanted.shape, dtype=torch.float64)):
                reader.read_shard(source, shards, 0, out)
                assert torch.equal(out, wanted.to(out.dtype))


def test_tiles_that_do_not_make_up_a_tensor(tmp_path: Path) -> None:
    tiles = _tiles(torch.ones(4, 4), [0, 2, 4], [0, 2, 4])
    assert open_checkpoint(_save_tiles(tmp_path / "all", tiles)), "negative control"
    twice = [*tiles[:3], (tiles[3][0], [2, 1]), (torch.ones(1, 4), [4, 0])]
    for name, some in (("gap", [*tiles[:1], *tiles[2:]]), ("twice", twice), ("overlap", [*tiles, tiles[0]])):
        with pytest.raises(WeightsError, match=r"the parts of w in .* do not make up a tensor of shape"):
            open_checkpoint(_save_tiles(tmp_path / name, some))
