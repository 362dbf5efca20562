"""Never silently wrong outside of the graph: what users do around a model, on real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import processes
from tests.runtime import ranks

Ran = list[dict[str, Any]]


def _run(world: int, work: Any, factory: pytest.TempPathFactory) -> Ran:
    results = processes.run(world, work, out=factory.mktemp(work.__name__))
    for rank, result in enumerate(results):
        assert "error" not in result, f"rank {rank}:\n{result.get('error')}"
    return results


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return _run(2, ranks.norms, tmp_path_factory)


@pytest.fixture(scope="module")
def agreement(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return _run(2, ranks.agreement, tmp_path_factory)


class TestGradientNorms:
    @pytest.mark.parametrize("name", ["replicated", "overlapping", "tied"])
    def test_every_element_of_the_dense_model_counts_once(self, norms: Ran, name: str) -> None:
        for result in norms:
            assert all(e < 1e-12 for e in result[f"{name}: errors"].values()), result[f"{name}: errors"]
            assert result[f"{name}: detached"] < 1e-12
            assert result[f"{name}: some"] < 1e-12
            assert result[f"{name}: same bits"]
            assert result[f"{name}: dtype"] is torch.float64
            assert result[f"{name}: counting shards only"] > 1e-3, "negative control"

    def test_two_models_and_one_that_is_not_parallelized(self, norms: Ran) -> None:
        assert all(result["two models and another"] < 1e-12 for result in norms)

    def test_clipping_scales_as_dense(self, norms: Ran) -> None:
        for result in norms:
            assert max(result["clipped"]) < 1e-10
            assert abs(result["clipped to"] - 0.5) < 1e-6
            assert result["values"] < 1e-10

    def test_what_cannot_be_right_raises_on_every_rank(self, norms: Ran) -> None:
        for result in norms:
            assert "norm_type=0 counts tensors" in result["tied: zero"]
            assert "max_norm: 1.0 on rank 0, 2.0 on rank 1" in result["different max_norm"]
            assert "non-finite" in result["not finite"]
            missing = result["no gradient on rank 1"]
            assert "head.weight: a tensor on rank 0, None on rank 1" in missing

    def test_nothing_to_clip_and_other_models(self, norms: Ran) -> None:
        for result in norms:
            assert result["no gradients"] == 0.0
            assert result["other models"]


DIFFERENCES = {
    "shape": "args[0]: (3, 5, 64) torch.float64 on rank 0, (2, 5, 64)",
    "dtype": "(3, 5, 64) torch.float64 on rank 0, (3, 5, 64) torch.float32 on rank 1",
    "structure": "kwargs['x']: (3, 5, 64) torch.float64 on rank 0",
    "constant": "kwargs['flag']: False on rank 0, True on rank 1",
    "argument": "kwargs['down']: nothing on rank 0",
    "input that needs a gradient": "(3, 5, 64) torch.float64, requires_grad on rank 1",
    "mode": "mode of the model: eval on rank 0, train on rank 1",
    "mode of a submodule": "mode of drop: eval on rank 0, train on rank 1",
    "gradients disabled": "gradients: enabled on rank 0, disabled on rank 1",
    "frozen": "parameter second.0.weight: torch.float64, requires_grad on rank 0",
    "attribute": "scale: nothing on rank 0, 9.0 on rank 1",
    "optimizer": "steps of optimizers: 0 on rank 0, 1 on rank 1",
    "other step": "what it does: call on rank 0, full_state_dict on rank 1",
    "debug: values": "values of args[0]:",
    "debug: weights": "values of parameter second.2.bias:",
}


class TestRanksThatDiffer:
    @pytest.mark.parametrize("name", DIFFERENCES)
    def test_every_rank_raises_and_says_who_differs_in_what(self, agreement: Ran, name: str) -> None:
        for result in agreement:
            assert result[name].startswith("MismatchError: step ")
            assert DIFFERENCES[name] in result[name]

    @pytest.mark.parametrize("name", DIFFERENCES)
    def test_then_all_can_go_on(self, agreement: Ran, name: str) -> None:
        for result in agreement:
            assert result.get(f"{name}: after", 0.0) < 1e-10

    def test_a_rank_that_raises_lets_the_others_know(self, agreement: Ran) -> None:
        assert agreement[1]["hook"].startswith("AutoTPError: drop got or lost a forward hook")
        for result in agreement[:1]:
            assert "error: nothing on rank 0, AutoTPError: drop got or lost" in result["hook"]

    def test_a_fused_optimizer_under_a_scaler_is_refused(self, agreement: Ran) -> None:
        assert all("train in bfloat16" in result["scaler"] for result in agreement)

    def test_equal_calls_pass(self, agreement: Ran) -> None:
        assert all(result["as before"] < 1e-10 and result["debug"] < 1e-10 for result in agreement)

    def test_a_rank_that_stays_away_is_named_in_time(self, agreement: Ran) -> None:
        assert agreement[1]["fewer calls"] == "stayed away"
        for result in agreement[:1]:
            assert "call: rank 1 did not come within 4 s" in result["fewer calls"]

    def test_a_rank_that_calls_no_backward_is_found(self, agreement: Ran) -> None:
        for result in agreement:
            assert result["no backward"].startswith("MismatchError: step")
            assert "did not come within 4 s" in result["no backward"]


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return _run(2, ranks.changes, tmp_path_factory)


class TestChangesAfterParallelize:
    @pytest.mark.parametrize(
        "name",
        ["an output of before", "dense state", "and back", "local state", "untouched", "partial state",
         "prefixed state", "assigned state", "in place", "buffer on the model", "replaced parameter", "replaced dict",
         "healed", "state of a copy"],
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

    def test_wrong_state_is_torchs_error_and_names_both_shapes(self, changes: Ran) -> None:
        for result in changes:
            wrong = result["wrong state"]
            assert wrong.startswith("RuntimeError: Error(s) in loading state_dict for Scaled")
            assert wrong.count("size mismatch") == 1
            assert "dense model is torch.Size([128, 64]), this rank's share of it is torch.Size([64, 64])" in wrong
            assert "Missing key(s)" in result["missing keys"]

    def test_loading_keeps_shares(self, changes: Ran) -> None:
        for result in changes:
            assert result["assigned shapes"] == [(64, 64), (64,), (64, 64), (64,)]
            assert result["full state"]

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


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return _run(2, ranks.training, tmp_path_factory)


class TestTraining:
    @pytest.mark.parametrize("name", ["sgd", "adam", "foreach", "fused"])
    def test_an_optimizer_that_has_stepped_goes_on_as_dense(self, training: Ran, name: str) -> None:
        assert all(result[name] < 1e-9 for result in training)

    @pytest.mark.parametrize("name", ["sgd", "adam", "foreach", "fused"])
    def test_dense_checkpoints_of_optimizers_are_cut(self, training: Ran, name: str) -> None:
        assert all(result[f"{name}: loaded"] < 1e-9 for result in training)

    @pytest.mark.parametrize("name", ["Adafactor", "Muon", "LBFGS"])
    def test_optimizers_that_need_whole_weights_are_refused(self, training: Ran, name: str) -> None:
        for result in training:
            assert f"{name} needs the whole of" in result.get(name, f"{name} needs the whole of")

    def test_20_steps_with_dropout_from_different_seeds(self, training: Ran) -> None:
        for result in training:
            assert result["dropping"]
            assert result["outputs agree"]
            assert result["whole parameters agree"]
            assert result["shards differ"], "negative control"

    def test_whole_values_drop_the_same_and_shards_their_own(self, training: Ran) -> None:
        assert all(result["shared"] and not result["own"] for result in training)


def test_models_one_after_another_of_which_some_ranks_hold_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ranks that have made different numbers of groups still find each other."""
    results = _run(3, ranks.replicas, tmp_path_factory)
    for result in results:
        for number in range(3):
            assert result[f"{number}: outputs"] < 1e-12
            assert result[f"{number}: gradients"] < 1e-9
    assert sorted(result["0: groups"] for result in results) == [[1, 3], [2, 3], [2, 3]]
