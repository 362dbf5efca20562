"""Files that are damaged, hostile, quantized or of other formats: an error on every rank, and nothing has changed."""

from __future__ import annotations

import collections
import pickle
import random
import shutil
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import autotp
from autotp.weights.checkpoint import open_checkpoint
from autotp.weights.tensor_source import FileTensor, Reader
from tests.processes import Ran, results_of
from tests.weights import ranks_checkpoint
from tests.weights.ranks import Table


@pytest.fixture(scope="module", params=[2, 3])
def bad(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("bad")
    return results_of(request.param, ranks_checkpoint.bad_files, tmp_path_factory, folder)


def test_what_is_wrong_on_one_rank_is_an_error_on_all_and_changes_nothing(bad: Ran, tmp_path: Path) -> None:
    sources = ranks_checkpoint.bad_sources(tmp_path / "again", Table().state_dict())
    for result in bad:
        for name, (_, said) in sources.items():
            assert result[name].startswith("WeightsError"), (name, result[name])
            assert said in result[name], (name, result[name])
        assert not result["ran"], "code in a pickle"
        assert result["control"].startswith("changed: nothing raised"), "negative control"


def test_files_that_change_while_they_are_read(bad: Ran) -> None:
    for result in bad:
        for file in ("safetensors", "pt"):
            assert "No such file" in result[f"vanished {file}"]
            assert "was written while its weights were read" in result[f"cut {file}"]
            assert "was written while its weights were read" in result[f"rewritten {file}"]
        assert "was written while its weights were read" in result["cut dcp"]
        assert "was written while its weights were read" in result["grows while it is read safetensors"]
        for name in result:
            assert name in ("control", "ran") or result[name].startswith("WeightsError"), (name, result[name])


def test_one_ranks_shards_are_told_from_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a subclass of tensors would be saved that marks one rank's shards."""
    module = types.ModuleType("autotp.weights.shard_tensor")

    def _rebuild(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it must not run")

    _rebuild.__module__, module._rebuild = module.__name__, _rebuild  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Shard:
        def __reduce__(self) -> Any:
            return _rebuild, (torch.ones(3),)

    monkeypatch.setattr(_rebuild, "__qualname__", "_rebuild")
    torch.save({"a": torch.ones(2), "w": Shard()}, tmp_path / "a.pt")
    with pytest.raises(autotp.WeightsError, match=r"one rank's shards.*w \(autotp\.weights\.shard_tensor\._rebuild\)"):
        open_checkpoint(tmp_path / "a.pt")

    class Other(torch.Tensor):
        pass

    monkeypatch.setattr(sys.modules[__name__], "Other", Other, raising=False)
    Other.__qualname__ = "Other"
    torch.save({"w": torch.ones(2).as_subclass(Other)}, tmp_path / "b.pt")
    with pytest.raises(
        autotp.WeightsError, match=r"no plain tensors: w \(tests\.weights\.test_checkpoint_damaged\.Other\)"
    ):
        open_checkpoint(tmp_path / "b.pt")


def test_tensors_with_attributes_parameters_and_views_are_plain(tmp_path: Path) -> None:
    marked = torch.arange(6.0)
    marked.mark = 1  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.arange(4.0))
    parameter.mark = 2  # type: ignore[attr-defined]
    narrow = torch.arange(9).to(torch.uint16)
    float8 = torch.arange(4.0).to(torch.float8_e4m3fn)
    state = {"a": marked, "b": parameter, "c": torch.ones(5, 4)[1:4].t(), "d": narrow, "e": float8, "f": marked[2:]}
    torch.save(collections.OrderedDict(state), tmp_path / "a.pt")
    for name, tensor in _read(tmp_path / "a.pt").items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor.float(), state[name].detach().float()), name


def test_an_archive_that_something_else_has_packed_is_read(tmp_path: Path) -> None:
    state = {"a": torch.randn(2), "b": torch.randn(3)}
    torch.save(state, tmp_path / "saved")
    with zipfile.ZipFile(tmp_path / "saved") as saved, zipfile.ZipFile(tmp_path / "packed", "w") as packed:
        for name in reversed(saved.namelist()):
            packed.writestr(name, saved.read(name))
    assert all(torch.equal(t, state[n]) for n, t in _read(tmp_path / "packed").items())


def test_links_to_elsewhere_are_read(tmp_path: Path) -> None:
    """As the caches of Hugging Face's hub have them."""
    from safetensors.torch import save_file

    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    state = {"a": torch.randn(3)}
    save_file(state, tmp_path / "blobs" / "1")
    (tmp_path / "blobs" / "2").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (tmp_path / "snapshot" / "model-1.safetensors").symlink_to("../blobs/1")
    (tmp_path / "snapshot" / "model.safetensors.index.json").symlink_to("../blobs/2")
    assert torch.equal(_read(tmp_path / "snapshot")["a"], state["a"])


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(autotp.WeightsError, match="cannot be read: PermissionError"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [0x0A80, 0x4B50])
def test_a_header_whose_length_looks_like_another_format(length: int, tmp_path: Path) -> None:
    """The length in the first bytes is the begin of a pickle, or of a zip archive."""
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(length)
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + text + b"\0" * 8)
    assert torch.equal(_read(tmp_path / "a")["a"], torch.zeros(2))


def test_a_pickle_that_would_make_room_for_much(tmp_path: Path) -> None:
    """As Python's unpickler that is written in C does."""
    for i, code in enumerate(
        (b"N" + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f.", pickle.BYTEARRAY8 + b"\xff" * 5 + b"\0" * 3 + b".")
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / ".metadata").write_bytes(b"\x80\x05" + code)
        with pytest.raises(autotp.WeightsError, match="is no description of a checkpoint"):
            open_checkpoint(folder)


def _read(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    with Reader() as reader:
        for name, source in open_checkpoint(path).items():
            found[name] = torch.zeros(source.shape, dtype=source.dtype)
            reader.read_shard(source, {}, 0, found[name])
    return found


def _bits(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {n: (t.shape, t.dtype, t.contiguous().view(-1).view(torch.uint8).tolist()) for n, t in tensors.items()}


def _damaged(good: bytes, draw: random.Random, end: int) -> bytes:
    """A file that is cut, or with bytes changed, lacking or more, in front of ``end``."""
    data, kind = bytearray(good), draw.randrange(6)
    at = draw.randrange(end)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        del data[at : at + draw.randrange(1, 4)]
    elif kind == 2:
        data[at:at] = draw.randbytes(draw.randrange(1, 4))
    else:
        for _ in range(draw.randrange(1, 3)):
            at = draw.randrange(end)
            data[at] = draw.choice([draw.randrange(256), data[at] ^ (1 << draw.randrange(8)), 48 + draw.randrange(10)])
    return bytes(data)


STATE = {
    "a.w": torch.arange(12.0).view(3, 4),
    "b": torch.arange(5),
    "c": torch.ones(2, 3).bfloat16(),
    "e": torch.ones(0, 3),
}


def test_any_damage_of_a_safetensors_header_is_an_error_or_what_the_library_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save, save_file

    save_file(STATE, tmp_path / "a", metadata={"format": "pt"})
    good, path, draw = (tmp_path / "a").read_bytes(), tmp_path / "b", random.Random(0)
    found: collections.Counter[str] = collections.Counter()
    assert save(STATE)
    for _ in range(1500):
        path.write_bytes(_damaged(good, draw, 8 + int.from_bytes(good[:8], "little")))
        try:
            tensors = _read(path)
        except autotp.WeightsError:
            found["refused"] += 1
            continue
        assert _bits(tensors) == _bits(load_file(path))
        found["read"] += 1
    assert min(found["refused"], found["read"]) >= 5, "both happen"


def test_any_damage_of_a_saved_state_dict_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    """Outside of the numbers themselves."""
    torch.save(STATE, tmp_path / "a")
    good, path, draw = (tmp_path / "a").read_bytes(), tmp_path / "b", random.Random(0)
    places = [(s.offset, s.offset + 96) for s in open_checkpoint(tmp_path / "a").values() if isinstance(s, FileTensor)]
    found: collections.Counter[str] = collections.Counter()
    for _ in range(1000):
        data = _damaged(good, draw, len(good))
        changed = [i for i, (x, y) in enumerate(zip(good, data)) if x != y]
        if len(data) == len(good) and any(a <= i < b for i in changed for a, b in places):
            continue
        path.write_bytes(data)
        try:
            tensors = _read(path)
        except autotp.WeightsError:
            found["refused"] += 1
            continue
        assert sorted(_bits(tensors).values()) == sorted(_bits(STATE).values())
        found["read"] += 1
    assert min(found["refused"], found["read"]) >= 5, "both happen"


def test_any_damage_of_a_training_state_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    """Names may change; that is found where they meet the model's."""
    dcp.save({"model": STATE, "step": 3}, checkpoint_id=tmp_path / "a", no_dist=True)
    path, draw = tmp_path / "a" / ".metadata", random.Random(0)
    good, expected = path.read_bytes(), _bits({f"model.{n}": t for n, t in STATE.items()})
    found: collections.Counter[str] = collections.Counter()
    for _ in range(700):
        path.write_bytes(_damaged(good, draw, len(good)))
        try:
            bits = _bits(_read(tmp_path / "a"))
        except autotp.WeightsError:
            found["refused"] += 1
            continue
        assert all(bits[n] == expected[n] for n in bits.keys() & expected.keys())
        found["read"] += 1
    assert min(found["refused"], found["read"]) >= 5, "both happen"
    shutil.rmtree(tmp_path / "a")
