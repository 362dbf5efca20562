"""Changes to a model after parallelize, on real processes: the graph sees each, or it is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autotp
from tests.models import SmallGPT
from tests.processes import Ran, results_of
from tests.runtime import ranks


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.changes, tmp_path_factory)


class TestChangesAfterParallelize:
    @pytest.mark.parametrize(
        "name",
        ["an output of before", "in place", "buffer on the model", "replaced parameter", "replaced dict", "healed",
         "state of a copy"],
    )  # fmt: skip
    def test_the_graph_sees_it(self, changes: Ran, name: str) -> None:
        assert all(result[name] < 1e-12 for result in changes)

    def test_dtypes_attributes_and_frozen_parameters(self, changes: Ran) -> None:
        for result in changes:
            assert result["float"] < 1e-5
            error, captures = result["attribute"]
            assert error < 1e-12
            assert captures == 1, "a changed attribute is captured anew"
            for frozen in (True, False):
                error, as_dense = result[f"frozen {frozen}"]
                assert error < 1e-10
                assert as_dense

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("replaced module", "second.1 was replaced"),
            ("replaced forward", "second.1 got or lost a forward of its own"),
            ("forward_hook", "first got or lost a forward hook"),
            ("forward_pre_hook", "first got or lost a forward pre-hook"),
            ("full_backward_hook", "first got or lost a backward hook"),
            ("full_backward_pre_hook", "first got or lost a backward pre-hook"),
            ("global hook", "hooks are registered for all modules"),
            ("new parameter", "parameter extra was added"),
            ("an object", "a builtins.object, whose content autotp cannot see"),
            ("part of a copy", "a part of a parallelized model cannot be copied"),
            ("pickle", "save autotp.full_state_dict(model)"),
        ],
    )
    def test_what_the_graph_cannot_follow_is_an_error(self, changes: Ran, name: str, said: str) -> None:
        assert all(said in result[name] for result in changes)

    def test_a_dense_parameter_in_a_shards_place_is_an_error_at_every_call(self, changes: Ran) -> None:
        for result in changes:
            assert all("has shape (128, 64), but this rank holds (64, 64)" in said for said in result[
                "replaced by a dense one"
            ])  # fmt: skip
            assert "has shape (128, 64), but this rank holds (64, 64)" in result["a dict with a dense one"]

    def test_hooks_of_the_model_itself_run_around_the_graph(self, changes: Ran) -> None:
        for result in changes:
            error, same_gradients = result["hooks of the model itself"]
            assert error < 1e-10
            assert same_gradients

    def test_a_copy_is_a_parallelized_model_of_its_own(self, changes: Ran) -> None:
        for result in changes:
            assert max(result["copy"]) < 1e-12
            error, original_untouched = result["gradients of a copy"]
            assert error < 1e-10
            assert original_untouched


def test_ties_that_are_cut_or_made_afterwards_are_an_error() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    model = autotp.parallelize(SmallGPT(hidden=32, vocabulary=301, layers=1), 1, example_inputs=(ids,))
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(autotp.AutoTPError, match=r"head\.weight and wte\.weight were one when .* and are two now"):
        model(ids)
    model.head.weight = model.wte.weight
    model(ids)
