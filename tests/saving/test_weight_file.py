"""Tests of weight_file and write_shard: the layout of a file, and what each rank writes into it."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autotp.errors import WeightsError
from autotp.saving import write_shard as shard_file
from autotp.saving.weight_file import _DTYPES, DenseTensor, WeightFile, index_of, parse_size, split_by_size
from autotp.saving.write_shard import write_shard
from autotp.weights.slicing import local_part
from passes import Shards
from passes.layouts.layout import IndexSet
from tests.comparison import raised


def test_all_dtypes(tmp_path: Path) -> None:
    """Header and order are those of the safetensors library, for every dtype and odd shapes and names."""
    shapes: list[tuple[int, ...]] = [(), (3,), (0, 2), (2, 1, 5)]
    tensors = {
        f'{i} {j} "ä\\': torch.ones(shape).to(dtype)
        for (i, dtype), (j, shape) in product(enumerate(reversed(_DTYPES)), enumerate(shapes))
    }
    save_file(tensors, tmp_path / "file", {"format": "pt"})
    described = tuple(DenseTensor(n, n, tuple(x.shape), x.dtype) for n, x in tensors.items())
    file = WeightFile("file", described, {"format": "pt"})
    expected = (tmp_path / "file").read_bytes()
    assert expected.startswith(file.header)
    assert file.size == len(expected)
    assert not expected.startswith(WeightFile("file", described[1:], {"format": "pt"}).header)
    unknown = WeightFile("file", (DenseTensor("x", "x", (1,), torch.complex128),))
    assert "x is of torch.complex128" in raised(lambda: unknown.header)
    with pytest.raises(WeightsError):
        _ = unknown.offsets


def test_sizes() -> None:
    """Sizes in words, and files that are filled up to them."""
    assert [parse_size(x) for x in (7, "7", "2KB", " 1.5 gb", "3m", "1TB")] == [7, 7, 2000, 1500000000, 3000000, 10**12]
    for wrong in (0, -1, True, "", "0", "GB", "-1KB", "1 KiB", None, 1.5):
        assert "max_shard_size" in raised(lambda wrong=wrong: parse_size(wrong))  # type: ignore[misc]
    tensors = [DenseTensor(n, n, (k,), torch.uint8) for n, k in zip("abcde", (3, 3, 9, 2, 4), strict=True)]
    assert [sorted(f.keys) for f in split_by_size(tensors, 6)] == [["c"], ["a", "b"], ["d", "e"]]
    assert [f.name for f in split_by_size([], 6)] == ["model.safetensors"]
    assert '"total_size": 21' in index_of(split_by_size(tensors, 6))


LAYOUTS = {
    "even": (((0, 3),), ((3, 6),), ((6, 9),)),
    "uneven": (((0, 4),), ((4, 8),), ((8, 9),)),
    "interleaved": (((0, 1), (3, 4), (6, 7)), ((1, 2), (4, 5), (7, 8)), ((2, 3), (5, 6), (8, 9))),
    "replicated": (((0, 6),), ((3, 9),), ((0, 3), (6, 9))),
}


@pytest.mark.parametrize("piece", [1, 40, 16 << 20])
def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """All ranks together write each byte once, from any memory, in pieces of any size, and nothing beside."""
    monkeypatch.setattr(shard_file, "PIECE", piece)
    short = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: short(file, data[: max(1, len(data) // 2)], at))
    for (name, runs), dim, dtype in product(
        LAYOUTS.items(), (None, 0, 1, 2), (torch.float32, torch.bfloat16, torch.bool)
    ):
        shape = [2, 3, 4] if dim is None else [9 if d == dim else 2 + d for d in range(3)]
        dense = torch.randn(shape).to(dtype)
        shards = {} if dim is None else {dim: Shards(9, tuple(IndexSet(r) for r in runs))}
        for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
            path = tmp_path / "file"
            path.write_bytes(b"x" * (dense.nbytes + 14))
            file, written = os.open(path, os.O_WRONLY), 0
            for rank in range(3):
                local = local_part(dense, shards, rank)
                back = [order.index(d) for d in range(3)]
                local = local.permute(order).contiguous().permute(back)  # the same values in another order of memory
                written += write_shard(file, 7, local, shards, rank, 3)
            os.close(file)
            expected = bytes(dense.contiguous().view(torch.uint8).numpy().reshape(-1).data)
            assert path.read_bytes() == b"x" * 7 + expected + b"x" * 7, (name, dim, order)
            assert written == dense.nbytes
    scalar = torch.tensor(2.5)
    path.write_bytes(bytes(4))
    file = os.open(path, os.O_WRONLY)
    assert sum(write_shard(file, 0, scalar, {}, rank, 3) for rank in range(3)) == 4
    assert write_shard(file, 0, torch.zeros(0, 3), {}, 0, 3) == 0
    assert write_shard(file, 0, torch.zeros(3, 0).t(), {}, 0, 3) == 0
    os.close(file)
    assert torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).item() == 2.5


def test_views(tmp_path: Path) -> None:
    """Lazy conjugates and negatives are written as their values; a mapped file is read from."""
    values = torch.randn(4, 3, dtype=torch.complex64)
    torch.randn(12).numpy().tofile(tmp_path / "mapped")
    mapped = torch.from_file(str(tmp_path / "mapped"), shared=True, size=12).view(3, 4)
    for tensor in (values.conj(), values.conj().imag, mapped, mapped.t(), mapped[:, 1:]):
        save_file({"x": tensor.resolve_conj().resolve_neg().contiguous()}, tmp_path / "file")
        expected = (tmp_path / "file").read_bytes()
        file = WeightFile("file", (DenseTensor("x", "x", tuple(tensor.shape), tensor.dtype),))
        (tmp_path / "own").write_bytes(file.header)
        descriptor = os.open(tmp_path / "own", os.O_WRONLY)
        for rank in range(2):
            write_shard(descriptor, file.offsets["x"], tensor, {}, rank, 2)
        os.close(descriptor)
        assert (tmp_path / "own").read_bytes() == expected
        assert torch.equal(load_file(tmp_path / "own")["x"], tensor.resolve_neg())
