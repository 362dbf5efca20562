"""Adapters of a parallelized model, on real processes: merged, switched and unloaded as the dense model's are."""

from __future__ import annotations

import pytest

from tests.processes import Ran, results_of
from tests.runtime import ranks_adapters

pytest.importorskip("peft")
CHANGES = ("other adapter", "scale")
KEPT = ("as before", "merge", "unmerge", "merge safely", "unmerge again")
STEPS = (*CHANGES, *KEPT, "first adapter again", "a step of training later")


@pytest.fixture(scope="module", params=[2, 3])
def merges(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(request.param, ranks_adapters.merges, tmp_path_factory)


@pytest.fixture(scope="module")
def differing(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks_adapters.differing, tmp_path_factory)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks_adapters.flags, tmp_path_factory)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks_adapters.copies, tmp_path_factory)


@pytest.mark.parametrize("kind", ranks_adapters.KINDS)
class TestAdapters:
    def test_weights_and_adapters_are_split(self, merges: Ran, kind: str) -> None:
        assert all(result[kind]["split"] for result in merges)

    def test_each_step_does_what_it_does_to_the_dense_model(self, merges: Ran, kind: str) -> None:
        for result in merges:
            steps = {name: result[kind][name] for name in STEPS if name in result[kind]}
            assert len(steps) >= 5
            for name, (error, moved) in steps.items():
                assert error < 1e-12, name
                assert moved > 1e-3 if name in CHANGES else name not in KEPT or moved < 1e-12, name

    def test_adapters_can_be_disabled(self, merges: Ran, kind: str) -> None:
        assert all(result[kind]["disabled"] < 1e-12 for result in merges)

    def test_a_model_without_adapters_is_parallelized(self, merges: Ran, kind: str) -> None:
        for result in merges:
            assert max(result[kind]["merge and unload"]) < 1e-12
            assert result[kind]["class"] == "Grouped"
            gradients, norm = result[kind]["training without adapters"]
            assert gradients < 1e-7, "the bias of keys has a gradient that is zero but for rounding"
            assert norm < 1e-10
            assert result[kind]["loading without adapters"] < 1e-12


def test_a_forward_that_unmerges_runs_as_python_or_is_an_error(merges: Ran) -> None:
    for result in merges:
        assert max(result["lora"]["disabled while merged"]) < 1e-12
        assert "calls unmerge of " in result["lora"]["disabled while merged, gradients on"]


@pytest.mark.parametrize("name", ["unload", "merge of a copy", "copy without adapters"])
def test_copies_are_models_of_their_own(copies: Ran, name: str) -> None:
    assert all(max(result[name]) < 1e-12 for result in copies)


def test_an_adapter_that_is_deleted_is_an_error(copies: Ran) -> None:
    assert all("was removed since autotp.parallelize" in result["adapter deleted"] for result in copies)


def test_a_model_in_parts_merges_and_is_not_unloaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    for result in results_of(2, ranks_adapters.in_parts, tmp_path_factory):
        assert result["in parts"]
        assert max(result[name] for name in ("as before", "merge_adapter", "unmerge_adapter", "after")) < 1e-12
        assert "unload changes the structure of a PeftModel that was captured in parts" in result["unload"]


def test_ranks_that_merge_differently_raise_before_anything_changes(differing: Ran) -> None:
    for result in differing:
        assert "arguments: () [('ada" in result["other adapters"]
        assert "['other']" in result["other adapters"]
        assert result["as before"] < 1e-12


def test_an_error_in_a_merge_is_one_on_all_ranks(differing: Ran) -> None:
    for result in differing:
        assert "NaNs detected" in result["not finite on one rank"]
        assert "what it does: call on rank 0, merge of " in result["merge on one rank"]


@pytest.mark.parametrize("name", ["list", "list, item", "set", "dict", "nested", "list, back"])
def test_containers_of_plain_values_are_captured_anew(flags: Ran, name: str) -> None:
    for result in flags:
        error, moved, captures, later = result[name]
        assert error < 1e-12
        assert moved > 1e-3, "the change matters"
        assert captures == later == 1, "and is captured once"


@pytest.mark.parametrize("name", ["merging layer", "unmerging layer"])
def test_a_layer_may_merge_when_its_mode_changes(flags: Ran, name: str) -> None:
    assert all(result[name][0] < 1e-12 for result in flags)
