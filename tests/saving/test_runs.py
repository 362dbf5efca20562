"""Tests of what follows a save: training, copies, submodules, adapters, other groups of ranks."""

from __future__ import annotations

import pytest

from tests.processes import results_of
from tests.saving import ranks_classes, ranks_groups, ranks_runs


@pytest.mark.parametrize("name", ["gpt2"])
def test_going_on(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A run goes on after each way to save, and each writes the dense model that was trained as far."""
    for result in results_of(2, ranks_runs.going_on, tmp_path_factory, tmp_path_factory.mktemp("runs"), name):
        ways = [way for way in result if f"{way}: read" in result]
        assert len(ways) == 5
        for way in ways:
            assert result[way] == (True, True, []), way
            assert result[f"{way}: read"] == [], way
        assert result["generate"]
        assert result.get("from_pretrained", True)


def test_copies(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies, submodules and transposed weights are saved as the dense ones; options that cannot be are refused."""
    for result in results_of(2, ranks_runs.copies, tmp_path_factory, tmp_path_factory.mktemp("copies")):
        same = (
            "copy",
            "copy, by save",
            "copy inside",
            "inner",
            "inner, by save",
            "layer",
            "transposed",
            "after a call",
        )
        for name in same:
            assert result[name] == [], name
        assert "cannot be pickled" in result["pickle"]
        assert "upload it from one rank" in result["hub"]
        assert "torch.distributed.checkpoint" in result["distributed"]
        assert result["variant"] == (["model.fp16.safetensors"], True)
        assert result["thread"] == ("nothing raised", [])


def test_adapters(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The files of peft's adapters are the dense model's, and peft reads them."""
    pytest.importorskip("peft")
    for result in results_of(2, ranks_runs.adapters, tmp_path_factory, tmp_path_factory.mktemp("adapters")):
        for kind in ("lora", "dora", "saved", "embedding", "several"):
            assert result[kind] == [], kind
            assert result[f"{kind} by save"] == [], kind
            assert result[f"{kind}: read"] < 1e-3, kind
        assert result["other"] == []
        assert "only safetensors" in result["bin"]


@pytest.mark.parametrize("how", ["auto", "mesh"])
def test_groups(how: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first group of ranks writes, and the second returns when it has, or has failed."""
    results = results_of(4, ranks_groups.groups, tmp_path_factory, tmp_path_factory.mktemp("groups"), how)
    for rank, result in enumerate(results):
        for name in ("all", "again", "after the first group alone", "as it was", "slow"):
            assert result[name], name
        assert "No space left" in result["failure"]
        assert result["different models"] == [13, 4]
        if rank >= 2:
            assert "within the timeout" in result["second alone"]
            assert 3 < result["seconds"] < 10


def test_classes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A class of its own, weights that are left out, names that files have otherwise, and a model in parts."""
    for result in results_of(2, ranks_classes.classes, tmp_path_factory, tmp_path_factory.mktemp("classes")):
        assert result["own class"] == []
        assert result["left out"]
        assert result["names are others"] == ["model.safetensors"]  # the dense model's has a tensor for each expert
        assert result["experts"] == []
        assert result["in parts"] == []
        assert result["in parts, after a call"] == []
