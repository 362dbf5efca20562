"""Tests of save: the files are the dense model's to the byte, whatever its layouts and dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import results_of
from tests.saving import ranks
from tests.saving.ranks import LIBRARY, PLAIN, SIZES, differing


@pytest.mark.parametrize(
    ("world", "names", "dtypes"),
    [
        (2, LIBRARY, (None,)),
        (3, ("gpt2",), ("bfloat16",)),
        (4, ("llama",), (None,)),
        (8, ("llama",), (None,)),
    ],
)
def test_bytes(
    world: int, names: tuple[str, ...], dtypes: tuple[str | None, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Columns, rows; fused, interleaved, grouped projections; uneven sizes, replicated key-value heads, tied ones."""
    folder = tmp_path_factory.mktemp("bytes")
    for result in results_of(world, ranks.same_bytes, tmp_path_factory, folder, names, dtypes):
        assert len(result) == 2 * len(SIZES) * len(names) * len(dtypes)
        for case, files in result.items():
            assert files == [], case
    written = folder / f"autotp {names[0]} {dtypes[0]} {SIZES[1]}"
    assert len(list(written.glob("*.safetensors"))) > 1
    path = next(written.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    changed = differing(folder / f"dense {names[0]} {dtypes[0]} {SIZES[1]}", written)
    assert changed == [path.name]  # the comparison sees one byte


@pytest.mark.parametrize("world", [3])
def test_plain_modules(world: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of any module the file is that of safetensors; it is read back. Parameters are mixed, transposed, tied."""
    folder = tmp_path_factory.mktemp("plain")
    for result in results_of(world, ranks.same_plain_bytes, tmp_path_factory, folder, PLAIN):
        for name in PLAIN:
            assert result[name], name
            on_disk, in_index = result[f"{name}: files"]
            assert on_disk == in_index > 1
            assert result[f"{name}: several files"] == [], name
            assert result[f"{name}: in the index"], name
            assert result[f"{name}: read back"] == [], name


def test_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A save takes no more memory than a few pieces of a tensor."""
    folder: Path = tmp_path_factory.mktemp("memory")
    for result in results_of(2, ranks.memory, tmp_path_factory, folder):
        assert result["shards"] > 100 << 20
        assert result["save"] < 64 << 20, result
        assert result["full_state_dict"] > 100 << 20, result  # the measure sees a gather
