"""Tests of staging: a folder takes another's place at once, whenever a process dies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotp.errors import WeightsError
from autotp.saving import staging as file
from autotp.saving.staging import Staging
from tests.comparison import raised
from tests.saving.killed import deaths, forked

OTHERS = {
    "tokenizer.json": "t",
    "runs/a/log": "l",
    "checkpoint-500/model.safetensors": "earlier",
    "model.fp16.safetensors": "f",
}
OLD = {"config.json": "old", "model-00001-of-00002.safetensors": "old", "model-00002-of-00002.safetensors": "old"}
OLD |= {"model.safetensors.index.json": "old", "pytorch_model.bin": "old", "pytorch_model.bin.index.json": "old"}
NEW = {"config.json": "new", "model.safetensors": "new"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    hidden = (".token", ".lock")
    return {
        str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name not in hidden
    }


def save(folder: str | os.PathLike[str], files: dict[str, str] = NEW) -> None:
    staging = Staging(folder)
    staging.check()
    token = staging.create()
    assert staging.sees(token)
    write(staging.path, files)
    staging.commit()


def in_place(folder: Path) -> None:
    """What others do: write over the old files."""
    for name in OLD:
        (folder / name).unlink()
    write(folder, NEW)


def died(save: Callable[[Path], Any], folder: Path) -> tuple[list[str], int]:
    """What is wrong after a death at each moment, and after the save that follows; and how many moments there were."""
    wrong, before, after, number = [], OLD | OTHERS, NEW | OTHERS, 0

    def afresh() -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        write(folder, OLD | OTHERS)

    afresh()
    for number in deaths(lambda: save(folder), folder.parent):
        if not folder.exists():
            wrong.append(f"{number}: gone")
        elif read(folder) not in (before, after):
            wrong.append(f"{number}: a mixture")
        save(folder)
        if os.listdir(folder.parent) != [folder.name] or {".token", ".lock"} & set(os.listdir(folder)):
            wrong.append(f"{number}: left {os.listdir(folder.parent)} {os.listdir(folder)}")
        if read(folder) != after:
            wrong.append(f"{number}: the next save")
        afresh()
    return wrong, number


def test_deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies at any operation leaves the old folder or the new one, and the next save nothing else."""
    wrong, moments = died(save, tmp_path / "a b ä" / "ckpt é 1")
    assert wrong == []
    assert moments > 20
    monkeypatch.setattr(file, "_exchange", lambda *_: False)
    wrong, moments = died(save, tmp_path / "two renames" / "ckpt")
    assert [w.split(": ")[1] for w in wrong] == ["gone"]
    assert moments > 20
    wrong = []
    write(tmp_path / "in place" / "ckpt", OLD | OTHERS)
    for _ in deaths(lambda: in_place(tmp_path / "in place" / "ckpt"), tmp_path / "in place"):
        wrong.append(read(tmp_path / "in place" / "ckpt") not in (OLD | OTHERS, NEW | OTHERS))
        write(tmp_path / "in place" / "ckpt", OLD | OTHERS)
    assert any(wrong)  # the check can fail


def test_new_folder(tmp_path: Path) -> None:
    """A folder that is not there, with parents that are not, and one that a link points to."""
    save(str(tmp_path / "deep" / "er") + "/", NEW)
    assert read(tmp_path / "deep" / "er") == NEW
    assert os.listdir(tmp_path / "deep") == ["er"]
    (tmp_path / "link").symlink_to(tmp_path / "target")
    save(tmp_path / "link")
    save(tmp_path / "link", {"config.json": "newer"})
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "target") == {"config.json": "newer"} | {"model.safetensors": "new"}


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be replaced is refused with a reason, and stays as it is."""
    (tmp_path / "file").write_text("text")
    assert "is a file" in raised(lambda: save(tmp_path / "file"))
    (tmp_path / "work" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inside")
    for folder in (".", "", "..", tmp_path / "work", "/"):
        assert "working directory" in raised(lambda folder=folder: save(folder)), folder
    save("below")
    save("../beside")
    assert os.getcwd() == str(tmp_path / "work" / "inside")
    assert os.listdir() == ["below"]
    assert (tmp_path / "file").read_text() == "text"


def test_other_files(tmp_path: Path) -> None:
    """What belongs to other weights stays: variants, adapters, subfolders; a link stays a link; modes stay."""
    folder = tmp_path / "ckpt"
    write(folder, OLD | OTHERS | {"adapter_model.safetensors": "a", "other/notes": "n", "README.md": "card"})
    (folder / "latest").symlink_to("runs")
    (folder / "gone").symlink_to("nowhere")
    folder.chmod(0o750)
    (folder / "runs").chmod(0o700)
    save(folder, NEW | {"other/config.json": "new"})
    kept = {"adapter_model.safetensors": "a", "other/notes": "n", "README.md": "card", "other/config.json": "new"}
    assert read(folder) == NEW | OTHERS | kept
    assert os.readlink(folder / "latest") == "runs"
    assert os.readlink(folder / "gone") == "nowhere"
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder / "runs").stat().st_mode & 0o777 == 0o700
    save(folder, {"adapter_model.safetensors": "b"})
    assert read(folder)["model.safetensors"] == "new"
    assert read(folder)["adapter_model.safetensors"] == "b"
    save(folder, {"model.fp16-00001-of-00001.safetensors": "c", "model.safetensors.index.fp16.json": "c"})
    found = read(folder)
    assert "model.fp16.safetensors" not in found
    assert found["model.safetensors"] == "new"


def test_written_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others write into the old folder in the last moment is in the new one; a card is changed there."""
    folder, exchange = tmp_path / "ckpt", file._exchange
    write(folder, OLD | {"README.md": "card", "runs/log": "1"})

    def late(first: Path, second: Path) -> bool:
        write(folder, {"runs/late": "2"})
        with open(folder / "runs" / "log", "a") as log:
            log.write("2")
        return exchange(first, second)

    monkeypatch.setattr(file, "_exchange", late)
    staging = Staging(folder)
    staging.create()
    (staging.path / "README.md").write_text((staging.path / "README.md").read_text() + "!")
    assert (folder / "README.md").read_text() == "card"
    staging.commit()
    assert read(folder) == {"config.json": "old"} | OLD | {"README.md": "card!", "runs/log": "12", "runs/late": "2"}


def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two savers to a folder fails, at any moment of the first, and the first does not notice."""
    folder = tmp_path / "ckpt"
    write(folder, OLD)
    first = Staging(folder)
    first.create()
    assert "another process is saving" in raised(lambda: Staging(folder).create())
    write(first.path, NEW)
    after, exchange = [], file._exchange

    def late(a: Path, b: Path) -> bool:
        done = exchange(a, b)
        after.append(os.waitstatus_to_exitcode(forked(lambda: save(folder, {"config.json": "2"}))))
        return done

    monkeypatch.setattr(file, "_exchange", late)
    first.commit()
    assert after == [1]
    assert read(folder) == NEW
    save(folder, {"config.json": "2"})
    assert read(folder)["config.json"] == "2"
    lost = Staging(folder)
    lost.create()
    lost.discard()
    assert os.listdir(tmp_path) == ["ckpt"]


def test_taken_in_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that find no leftover at once: one gets an error that names the other."""
    folder = tmp_path / "ckpt"
    first, second = Staging(folder), Staging(folder)
    first.create()
    monkeypatch.setattr(Staging, "_remove_leftovers", lambda _: None)
    assert "another process is saving" in raised(second.create)
    first.commit()
    assert os.listdir(tmp_path) == ["ckpt"]


def test_without_locks_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that have neither; and a failure of the last rename, which leaves the old folder."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(file.fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    folder = tmp_path / "ckpt"
    write(folder, OLD | OTHERS)
    save(folder)
    assert read(folder) == NEW | OTHERS
    assert os.listdir(tmp_path) == ["ckpt"]
    monkeypatch.setattr(file, "_exchange", lambda *_: False)
    rename, staging = os.rename, Staging(folder)
    staging.create()
    write(staging.path, {"config.json": "2"})

    def fails(source: Any, target: Any) -> None:
        if str(source) == str(staging.path):
            refuse()
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(OSError, match="not supported"):
            staging.commit()
    assert read(folder) == NEW | OTHERS
    staging.discard()
    assert os.listdir(tmp_path) == ["ckpt"]


def test_parent_not_writable(tmp_path: Path) -> None:
    """A folder beside which nothing may be made is named, and stays as it is."""
    (tmp_path / "closed").mkdir()
    write(tmp_path / "closed" / "ckpt", OLD)
    (tmp_path / "closed").chmod(0o555)
    for path in (*tmp_path.parents, tmp_path):
        if os.stat(path).st_uid == os.getuid() and not path.stat().st_mode & 0o001 and path.name.startswith("pytest-"):
            path.chmod(0o755)

    def as_nobody() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        error = raised(lambda: save(tmp_path / "closed" / "ckpt"))
        assert "Permission" in error
        assert "ckpt" in error

    assert forked(as_nobody) == 0
    (tmp_path / "closed").chmod(0o755)
    assert read(tmp_path / "closed" / "ckpt") == OLD
    with pytest.raises(WeightsError):
        Staging(__file__).check()
