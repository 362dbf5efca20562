"""Files of weights: any part of a tensor is read in pieces, and files that are no checkpoints are refused."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autotp
from autotp.weights import tensor_source
from autotp.weights.checkpoint import open_checkpoint
from autotp.weights.slicing import local_part
from autotp.weights.tensor_source import Reader
from passes import IndexSet, Shards


def _tensors() -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    for dims, dtype in itertools.product(range(4), (torch.float32, torch.bfloat16, torch.float64)):
        shape = [int(n) for n in torch.randint(1, 9, (dims,))]
        yield f"{dims} {dtype}", torch.randn(shape).to(dtype)
    yield "empty", torch.ones(3, 0)


@pytest.mark.parametrize(("piece", "row"), [(1, 1), (16, 1), (40, 8), (100, 8), (1 << 20, 1), (1 << 20, 1 << 14)])
def test_any_part_in_any_pieces(piece: int, row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(tensor_source, "PIECE", piece)
    monkeypatch.setattr(tensor_source, "ROW", row)
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
        (
            {"model": {"weight": torch.ones(2)}, "epoch": 3},
            r"has entries that are no plain tensors: model \(dict\), epoch \(int\)",
        ),
        ({"conj": torch.ones(2, dtype=torch.complex64).conj()}, "has entries that are no plain tensors: conj "),
        ({"sparse": torch.eye(3).to_sparse()}, "has entries that are no plain tensors: sparse "),
        ("compressed", "it is compressed"),
        ("big", "in another order of bytes"),
        ("no index", "is no index of a checkpoint"),
        ("old", "a pickle, as torch.save wrote them before torch 1.6"),
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
    elif content in ("compressed", "big"):
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
