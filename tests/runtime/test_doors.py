"""Ways to change a parallelized model from outside, and to take its tensors out: right, or an error that names it."""

from __future__ import annotations

import pytest

from tests.processes import Ran, results_of
from tests.runtime import ranks_doors


@pytest.fixture(scope="module")
def structure(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks_doors.structure, tmp_path_factory)


@pytest.fixture(scope="module")
def functional(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks_doors.functional, tmp_path_factory)


CHANGED = {
    "added module": ("extra (Linear) was added", "parameter extra.weight was added"),
    "replaced by a dense one": ("second.2 was replaced, a Linear by a Linear", "second.2.weight has shape (64, 128)"),
    "removed": ("second.1 was replaced, a GELU by a Linear", "parameter second.2.bias was removed"),
    "parametrized": ("second.2.parametrizations (ModuleDict) was added", "parameter second.2.weight was removed"),
    "weight norm": ("second.2.parametrizations (ModuleDict) was added", "parameter second.2.weight was removed"),
    "old weight norm": ("second.2 got or lost a forward pre-hook", "parameter second.2.weight was removed"),
    "data": ("second.2.weight has shape (64, 128), but this rank holds (64, 64)",) * 2,
    "meta": ("is on the meta device now, and has no values",) * 2,
    "meta in part": ("parameter second.2.weight is on the meta device now",) * 2,
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_structure_that_no_graph_knows_is_an_error_at_every_call(structure: Ran, name: str) -> None:
    called, uncalled = CHANGED[name]
    for result in structure:
        first, second, copied = result[name]
        assert called in first
        assert first == second
        assert uncalled in copied, "a copy that was changed before its first call"
        assert all(said.startswith("AutoTPError") for said in result[name])


def test_a_parameter_that_became_a_buffer_is_an_error(structure: Ran) -> None:
    for result in structure:
        assert all("parameter second.2.weight was removed" in said for said in result["buffer"])


def test_what_is_undone_is_forgotten(structure: Ran) -> None:
    for result in structure:
        assert "extra (Linear) was added" in result["undone"]
        assert result["undone: after"] < 1e-12


@pytest.mark.parametrize(
    "name",
    ["functional_call", "after functional_call", "checkpoint True", "checkpoint False", "autograd.grad",
     "AveragedModel", "share_memory", "copy.copy", "wrapped"],
)  # fmt: skip
def test_these_doors_give_what_the_dense_model_gives(functional: Ran, name: str) -> None:
    for result in functional:
        assert result[name] < 1e-10
        assert result["functional_call matters"] < -1e-3


def test_these_doors_are_closed(functional: Ran) -> None:
    for result in functional:
        assert "but this rank holds" in result["functional_call, dense"]
        assert "save autotp.full_state_dict(model)" in result["torch.save"]
        assert result["casts"] < 1e-5
