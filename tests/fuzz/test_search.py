"""Random transformers: a fixed few of them, and what the search does with one that fails."""

from __future__ import annotations

import random
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from autotp.cli.main import main
from autotp.fuzz.recipe import CHOICES, Recipe
from autotp.fuzz.search import Drawn, FuzzError, fuzz, judge
from passes.ops import collectives as parallel_collectives
from passes.proof import collectives
from passes.proof.claims import Unproved

FEW = 24


@pytest.mark.parametrize("start", range(0, FEW, 6))
def test_a_fixed_few(start: int) -> None:
    assert [str(each.failure) for each in fuzz(6, seed=2, start=start)] == []


def test_every_choice_is_drawn() -> None:
    assert {f.name for f in fields(Recipe)} == set(CHOICES)
    drawn = [Recipe.draw(random.Random(i)) for i in range(600)]
    for name, values in CHOICES.items():
        assert {getattr(recipe, name) for recipe in drawn} == set(values)
    assert Recipe.draw(random.Random(1)) == drawn[1]
    assert [eval(str(recipe)) for recipe in drawn] == drawn


def test_most_are_split() -> None:
    drawn: list[Drawn] = []
    fuzz(6, seed=3, progress=drawn.append)
    assert sum(each.split > 4 for each in drawn if each.tp > 1) >= 4


def test_what_fails_is_shrunk_and_written_as_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With entries that do not sum gradients every split model is wrong: the simplest that is split is left."""
    complex_one = Recipe(kv_heads=4, head_size=8, ffn=64, bias=True, tied=True, norm="rms", fused="pair")
    monkeypatch.setattr(Recipe, "draw", staticmethod(lambda source: complex_one))
    monkeypatch.setattr(parallel_collectives._Enter, "backward", staticmethod(lambda ctx, *g: (None, *g)))
    start = next(i for i in range(99) if random.Random(f"0 {i}").randint(1, 8) == 3)
    (found,) = fuzz(1, seed=0, start=start, directory=tmp_path)
    assert found.drawn == complex_one
    assert (found.failure.kind, found.tp) == ("wrong", 2)
    assert (found.recipe.bias, found.recipe.tied, found.recipe.norm) == (False, False, "layer")
    assert found.recipe.fused == "apart"
    (file,) = tmp_path.glob("test_fuzz_0_*.py")
    test = next(v for n, v in runpy.run_path(str(file)).items() if n.startswith("test_"))
    with pytest.raises(FuzzError, match="wrong"):
        test()
    monkeypatch.undo()
    test()


def test_the_proof_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Unproved("another group", "this one", "nothing")

    monkeypatch.setattr(collectives, "_require_all_ranks", refuse)
    with pytest.raises(FuzzError, match=r"unproved: NOT PROVED: .* expected another group"):
        judge(Recipe(kv_heads=4, head_size=8, ffn=64), tp=2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "--n", "2", "--seed", "5", "--write", str(tmp_path / "fuzz")]) == 0
    assert "2 random models of seed 5, " in capsys.readouterr().out
    assert not (tmp_path / "fuzz").exists()
    assert torch.get_default_dtype() is torch.float32
