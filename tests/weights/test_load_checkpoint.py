"""Models without weights, of which each rank reads its share: dense against parallel, and what is refused."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autotp
from autotp.verification.measure import Float64
from autotp.weights import checkpoint
from autotp.weights.checkpoint import Reader, open_checkpoint
from autotp.weights.slicing import local_part
from passes import IndexSet, Shards
from tests.models import SmallGPT, make
from tests.processes import Ran, results_of
from tests.weights import ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints."""
    from safetensors.torch import save_file

    made = tmp_path_factory.mktemp("checkpoints")
    with Float64():
        make("llama")[0].save_pretrained(made / "llama", max_shard_size="500KB")
        make("neox")[0].save_pretrained(made / "neox")
        state = make("gpt")[0].state_dict()
        del state["wte.weight"]
        torch.save({n: t if t.dim() < 2 else t.t().contiguous().t() for n, t in state.items()}, made / "gpt.pt")
        state = make("gpt2")[0].state_dict()
        del state["lm_head.weight"]
        save_file(state, made / "gpt2.safetensors")
    save_file(ranks.Table().state_dict(), made / "table.safetensors")
    assert (made / "llama" / "model.safetensors.index.json").is_file()
    return made


@pytest.fixture(scope="module")
def loaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(4, ranks.loaded, tmp_path_factory, folder)


@pytest.fixture(scope="module")
def refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.refused, tmp_path_factory, folder)


@pytest.mark.parametrize("name", [*ranks.FILES, "mapping and plan", "in place of others"])
def test_outputs_every_gradient_and_the_state_are_the_dense_models(loaded: Ran, name: str) -> None:
    for result in loaded:
        assert result[name]["error"] < 1e-10
        assert result[name]["state"]
        assert result[name]["only its share"]
        assert result[name]["captures"] == 1, "the graph that was made without weights does"


def test_a_rank_reads_its_share_in_pieces_and_no_more(loaded: Ran) -> None:
    for result in loaded:
        assert result["read beyond its share"] == []
        assert result["pieces"] > 10
        assert result["control: read whole"] > 10


@pytest.mark.parametrize("name", ranks.FILES)
def test_a_rank_reads_its_share_of_files_and_no_more(loaded: Ran, name: str) -> None:
    for result in loaded:
        count, share, whole = result[f"{name}: bytes"]
        assert share <= count <= 1.05 * share
        assert share < 0.6 * whole, "negative control"


def test_a_checkpoint_with_another_weight_gives_other_numbers(loaded: Ran) -> None:
    """The negative control."""
    assert all(result["control: one weight differs"] > 1e-6 for result in loaded)


def test_what_comes_after(loaded: Ran) -> None:
    for result in loaded:
        assert result["loaded again"] < 1e-10
        assert result["gradients are kept"]
        assert result["cast"] < 1e-10
        assert result["dtypes"] == {torch.float64}


SAID = {
    "missing": "WeightsError: the weights do not fit this Table:\n  missing: scale, up.weight\n",
    "unexpected": "unexpected: bias\n",
    "shape": "different: up.weight has shape (16, 32) there, (32, 16) in the model",
    "kind": "different: up.weight is of torch.int8 there, of torch.float32 in the model",
    "no tensor": "epoch is a int, not a tensor",
    "ranks differ": "up.weight in the weights: (32, 16) torch.float64 on rank 0, (32, 16) torch.float32 on rank 1",
    "values differ": "first elements of up.weight in the weights: ",
    "no file on one rank": "nowhere.safetensors",
    "cut short": "is cut short or damaged at",
    "without weights": "up.weight is on the meta device: pass weights=",
    "in parts": "load the dense model, and parallelize it without weights=",
    "buffer": "the buffer table is on the meta device and not persistent",
    "while reading, on one rank": "the disk is gone",
}


@pytest.mark.parametrize("name", SAID)
def test_what_does_not_fit_is_said_on_all_ranks_and_changes_nothing(refused: Ran, name: str) -> None:
    for result in refused:
        assert SAID[name] in result[name]
        assert not result[name].startswith("changed")


def test_the_file_that_transformers_would_take_is_taken(folder: Path, tmp_path: Path) -> None:
    """One file before an index, which may have been left by an earlier save of more."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        content = (folder / "table.safetensors").read_bytes() if name.endswith("s") else b'{"weight_map": {"a": "b"}}'
        (tmp_path / name).write_bytes(content)
    assert set(open_checkpoint(tmp_path)) == set(ranks.Table().state_dict())


def test_models_that_have_their_weights_go_to_a_device(folder: Path) -> None:
    """As far as there is one: the CPU."""
    x, dense = torch.ones(3, 16), ranks.Table()
    model = ranks.Table()
    model.load_state_dict(dense.state_dict())
    autotp.parallelize(model, 1, example_inputs=(x,), device="cpu")
    assert torch.allclose(model(x), dense(x), atol=1e-6)
    with autotp.empty_weights():
        model = ranks.Table()
    autotp.parallelize(model, 1, example_inputs=(x,), device="cpu", weights=folder / "table.safetensors")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_then_all_can_go_on(refused: Ran) -> None:
    assert all(result["then"] < 1e-6 for result in refused)


def test_models_without_weights_have_their_ties_buffers_and_attributes() -> None:
    with autotp.empty_weights():
        model = SmallGPT()
        batch = nn.BatchNorm1d(4)
    assert model.head.weight is model.wte.weight
    assert model.wte.weight.is_meta
    assert batch.running_var.tolist() == [1.0] * 4
    assert not nn.Linear(2, 2).weight.is_meta, "afterwards all is as before"
    shared = nn.Parameter(torch.ones(3), requires_grad=False)
    shared.tag = "kept"
    with autotp.empty_weights():
        model = nn.ParameterList([shared, shared, nn.Parameter(torch.ones(3))])
    assert model[0] is model[1]
    assert model[2] is not model[0]
    assert (model[0].tag, model[0].requires_grad) == ("kept", False)


def test_a_transformers_model_without_weights_has_its_buffers() -> None:
    dense, _ = make("llama")
    with autotp.empty_weights():
        model, _ = make("llama")
    buffers = dict(dense.named_buffers())
    assert buffers
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def _tensors() -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    for dims, dtype in itertools.product(range(4), (torch.float32, torch.bfloat16, torch.float64)):
        shape = [int(n) for n in torch.randint(1, 9, (dims,))]
        yield f"{dims} {dtype}", torch.randn(shape).to(dtype)
    yield "empty", torch.ones(3, 0)


@pytest.mark.parametrize(("piece", "row"), [(1, 1), (16, 1), (40, 8), (100, 8), (1 << 20, 1), (1 << 20, 1 << 14)])
def test_any_part_in_any_pieces(piece: int, row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(checkpoint, "PIECE", piece)
    monkeypatch.setattr(checkpoint, "ROW", row)
    plain = dict(_tensors())
    turned = {n: t.transpose(0, -1) if t.dim() > 1 else t for n, t in plain.items()}
    save_file(plain, tmp_path / "a.safetensors")
    torch.save(turned, tmp_path / "a.pt")
    for source, whole in ((tmp_path / "a.safetensors", plain), (str(tmp_path / "a.pt"), turned), (turned, turned)):
        found = open_checkpoint(source)
        assert found.keys() == whole.keys()
        with Reader() as reader:
            for name, tensor in whole.items():
                for dim in range(-1, tensor.dim()):
                    size = tensor.shape[dim] if dim >= 0 else 0
                    runs = ((0, size // 3), (size // 2, size)) if size > 3 else ((0, size),)
                    shards = {dim: Shards(size, (IndexSet(runs),))} if dim >= 0 else {}
                    for dtype in (tensor.dtype, torch.float64):
                        wanted = local_part(tensor, shards, 0)
                        out = torch.full(wanted.shape, 7.0, dtype=dtype)
                        reader.read_shard(found[name], shards, 0, out)
                        assert torch.equal(out, wanted.to(dtype)), (source, name, dim)
            assert reader.buffer(0).untyped_storage().nbytes() <= max(piece, 8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"nonsense and more", "neither a safetensors file nor one that torch.save"),
        ([1, 2], "holds a list, not a state dict"),
        ({"model": {"weight": torch.ones(2)}, "epoch": 3}, "has entries that are no plain tensors: model, epoch"),
        ({"conj": torch.ones(2, dtype=torch.complex64).conj()}, "has entries that are no plain tensors: conj"),
        ({"sparse": torch.eye(3).to_sparse()}, "has entries that are no plain tensors: sparse"),
        ("packed", "was packed by something else than torch.save"),
        ("compressed", "it is compressed"),
        ("big", "in another order of bytes"),
        ("no index", "is no index of a checkpoint"),
        ("old", "neither a safetensors file nor one that torch.save has written since torch 1.6"),
        ("folder", "has none of model.safetensors"),
        ("index", "names b.safetensors, which is not there"),
    ],
)
def test_files_that_are_no_checkpoints(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "old":
        torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    elif content == "folder":
        path = tmp_path
    elif content in ("packed", "compressed", "big"):
        torch.save({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "saved")
        way = zipfile.ZIP_DEFLATED if content == "compressed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(tmp_path / "saved") as saved, zipfile.ZipFile(path, "w", way) as packed:
            for name in saved.namelist():
                packed.writestr(name, b"big" if content == "big" and "byteorder" in name else saved.read(name))
    elif content == "no index":
        path = tmp_path / "model.safetensors.index.json"
        path.write_text("{}")
    elif content == "index":
        path = tmp_path / "model.safetensors.index.json"
        path.write_text('{"weight_map": {"a": "b.safetensors"}}')
    else:
        torch.save(content, path)
    with pytest.raises(autotp.WeightsError, match=said):
        open_checkpoint(path)
