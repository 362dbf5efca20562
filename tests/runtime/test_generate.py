"""``generate`` of transformers after parallelize, on real processes: the dense model's tokens, and a split cache."""

from __future__ import annotations

import pytest

from tests.processes import Ran, results_of
from tests.runtime import ranks_generate


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks_generate.ways, tmp_path_factory)


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks_generate.differences, tmp_path_factory)


class TestTokens:
    @pytest.mark.parametrize(
        "name",
        ["greedy", "another prompt", "beam", "left-padded", "sampling", "sampling beams", "assisted", "prompt lookup",
         "chunked prefill", "a copy",
         *(f"{model}: {way}" for model in ("sliding", "t5", "bart") for way in ("greedy", "static", "beam"))],
    )  # fmt: skip
    def test_are_the_dense_models_on_every_rank(self, ways: Ran, name: str) -> None:
        assert all(result[name] is True for result in ways)

    def test_would_tell_a_difference(self, ways: Ran) -> None:
        assert all(result["tokens vary"] and result["padding matters"] for result in ways)

    def test_a_copy_generates_by_itself(self, ways: Ran) -> None:
        assert all(result["a copy is its own"] for result in ways)


class TestInParts:
    @pytest.mark.parametrize("name", ["greedy", "beam", "sampling"])
    def test_tokens_are_the_dense_models(self, ways: Ran, name: str) -> None:
        assert all(result["in parts"] > 2 and result[f"in parts: {name}"] is True for result in ways)

    def test_ranks_that_differ_are_found(self, ways: Ran) -> None:
        for result in ways:
            assert "inputs: (2, 9) torch.int64" in result["in parts: prompts"]
            assert "values of args[0]: " in result["in parts: inputs"]


class TestSampling:
    def test_each_rank_has_its_own_random_numbers_back(self, ways: Ran) -> None:
        assert all(result["sampling: own numbers afterwards"] for result in ways)

    def test_without_rank_0_s_random_numbers_ranks_would_draw_other_tokens(self, ways: Ran) -> None:
        assert all("values of kwargs['input_ids']: " in result["sampling: without"] for result in ways)


class TestStreaming:
    def test_one_rank_may_stream(self, ways: Ran) -> None:
        assert all(result["streaming"] for result in ways)

    def test_a_rank_that_raises_lets_the_others_know(self, ways: Ran) -> None:
        assert ways[1]["a stream that breaks"] == "ValueError: the stream is closed"
        assert "ValueError: the stream is closed on rank 1" in ways[0]["a stream that breaks"]
        assert all(result["after that"] for result in ways)


class TestCaptures:
    def test_a_growing_prompt_is_captured_once(self, ways: Ran) -> None:
        assert all(result["captures"] == 2 for result in ways), "the prompt, and a token"

    def test_other_sizes_and_beams_take_the_same_graphs(self, ways: Ran) -> None:
        assert all(result["captures of all"] == 2 for result in ways)

    def test_the_graph_says_which_it_is(self, ways: Ran) -> None:
        for rank, result in enumerate(ways):
            assert result["text"].startswith(f"# rank {rank} of 2; graph 3 of 3, 3 captures; for input_ids[s")
            assert ", 1], past_key_values (4 tensors), position_ids[" in result["text"]


def test_only_the_logits_asked_for_are_gathered(ways: Ran) -> None:
    vocabulary = ranks_generate.VOCABULARY
    for result in ways:
        last, steps, three, whole = result["gathered"]
        assert last == 2 * vocabulary, "of a prompt of 2 x 9"
        assert steps == 2 * vocabulary * 10
        assert three == 2 * vocabulary * 3
        assert whole == 2 * vocabulary * 9


class TestCaches:
    @pytest.mark.parametrize("name", ["dynamic", "static", "initialized"])
    def test_one_that_is_passed_in_is_updated_and_can_be_used_further(self, ways: Ran, name: str) -> None:
        for result in ways:
            assert result[f"{name} cache: tokens"]
            assert result[f"{name} cache: length"] == [18, 18]
            assert result[f"{name} cache: goes on"]

    def test_one_can_be_cropped(self, ways: Ran) -> None:
        assert all(result["cropped cache"] for result in ways)

    @pytest.mark.parametrize(
        "name",
        [*(f"{kind} cache: {when}" for kind in ("dynamic", "static", "initialized") for when in ("held", "held then")),
         *(f"{model}: {way}cache" for model in ("sliding", "t5", "bart") for way in ("", "static "))],
    )  # fmt: skip
    def test_each_rank_holds_its_share_only(self, ways: Ran, name: str) -> None:
        for result in ways:
            (dense, dense_storage, dense_heads), (share, storage, heads) = result[name]
            assert dense > 0
            assert share * 2 == dense
            assert storage * 2 <= dense_storage, "and no whole tensor behind it"
            assert [n * 2 for n in heads] == dense_heads

    def test_a_submodules_cache_is_the_models_too(self, ways: Ran) -> None:
        for result in ways:
            assert result["a submodule's cache: held"] == [1, 1, 1, 1]
            assert result["a submodule's cache"] < 1e-12


class TestSubmodules:
    @pytest.mark.parametrize("name", ["inner model", "embeddings", "a layer's", "head"])
    def test_values_and_gradients_are_the_dense_models(self, ways: Ran, name: str) -> None:
        for result in ways:
            value, gradient, all_there = result[f"submodule: {name}"]
            assert value < 1e-12
            assert gradient < 1e-10
            assert all_there

    def test_encoders(self, ways: Ran) -> None:
        assert all(result[f"{name}: encoder"] < 1e-12 for result in ways for name in ("t5", "bart"))

    def test_changes_are_seen(self, ways: Ran) -> None:
        for result in ways:
            assert result["a changed submodule"] < 1e-12
            assert result["the change matters"]
            assert "layers.0 got or lost a forward hook" in result["a hook in a submodule"]

    def test_one_has_a_graph_of_its_own(self, ways: Ran) -> None:
        for rank, result in enumerate(ways):
            assert result["graph of a submodule"].startswith(
                f"# rank {rank} of 2; graph 1 of 1, 1 captures; for args[0][s"
            )


DIFFERENCES = {
    "values": "inputs: (2, 9) torch.int64 109, 27, 124, 6, ...",
    "shapes": "inputs: (2, 8) torch.int64 109, 27, 124, 6, ...",
    "a mask": "attention_mask: nothing on rank 0, (2, 9) torch.int64",
    "a number": "max_new_tokens: 5 on rank 0, 6 on rank 1",
    "config": "generation_config.max_new_tokens: 5 on rank 0, 6 on rank 1",
    "model's config": "model.generation_config.max_length: 20 on rank 0, 21 on rank 1",
    "processors": "{'temperature': 1.5} on rank 0",
    "other calls": "what it does: call on rank 0, generate on rank 1",
    "criteria": "what it does: end of generate on rank 0, call on rank 1",
    "call: values": "values of args[0]: 109, 27, 124, 6, ...",
    "call: mask": "values of kwargs['attention_mask']: True, True, True, True, ...",
    "call: submodule": "values of args[0]: 109, 27, 124, 6, ...",
}


class TestRanksThatDiffer:
    @pytest.mark.parametrize("name", DIFFERENCES)
    def test_every_rank_raises_and_says_in_what(self, differences: Ran, name: str) -> None:
        for result in differences:
            assert result[name].startswith("MismatchError: step ")
            assert DIFFERENCES[name] in result[name]
            assert result.get(f"{name}: after", True) is True

    @pytest.mark.parametrize("name", ["prompts", "masks", "numbers", "config", "cache", "after"])
    def test_all_generate_for_rank_0_where_that_is_asked(self, differences: Ran, name: str) -> None:
        assert all(result[f"broadcast: {name}"] is True for result in differences)

    @pytest.mark.parametrize("name", ["call", "step", "submodule"])
    def test_and_call_with_its_inputs(self, differences: Ran, name: str) -> None:
        assert all(result[f"broadcast: {name}"] < 1e-12 for result in differences)

    def test_caches_stay_each_ranks_own(self, differences: Ran) -> None:
        assert all(result["broadcast: cache held"] == (18, [1, 1]) for result in differences)

    @pytest.mark.parametrize(
        ("name", "said"),
        [("modes", "mode of the model: eval on rank 0, train on rank 1"),
         ("other calls", "what it does: call on rank 0, generate on rank 1"),
         ("processors", "{'temperature': 1.5} on rank 0")],
    )  # fmt: skip
    def test_what_is_no_input_is_still_an_error(self, differences: Ran, name: str, said: str) -> None:
        assert all(said in result[f"broadcast: {name}"] for result in differences)

    def test_it_costs_nothing_where_ranks_agree(self, differences: Ran) -> None:
        for result in differences:  # ten tokens of one layer: its two sums and the embedding's less the fused ones
            assert result["broadcast: cost"]["all_gather"] == 10
            assert result["broadcast: cost"]["all_reduce"] <= 30


def test_three_ranks_of_two_key_value_heads(tmp_path_factory: pytest.TempPathFactory) -> None:
    for result in results_of(3, ranks_generate.more_ranks_than_heads, tmp_path_factory):
        assert result["greedy"] is result["beam"] is result["static"] is True
        (dense, _, _), (share, storage, heads) = result["held"]
        assert share == storage == dense // 2, "replicas aside"
        assert heads == [1, 1]
        assert result["heads"] == [[1, 1]] * 3


def test_a_call_that_cannot_be_captured_runs_the_models_python(tmp_path_factory: pytest.TempPathFactory) -> None:
    results = results_of(2, ranks_generate.branches, tmp_path_factory)
    for rank, result in enumerate(results):
        assert result["whole"]
        assert max(*result["values"], result["after"], result["a copy"], result["captured as before"]) < 1e-12
        assert result["branches differ"]
        (warned,) = result["warned"]
        assert warned.startswith("a call of this Branches cannot be captured (")
        assert "Python that depends on the values in a tensor" in warned
        assert "values of args[1]: 1 (checksum" in result["flags differ"]
        assert ("in the middle on rank 1" if rank == 0 else "ValueError: in the middle") in result["raise"]
        assert "up.weight is split over the ranks, and code outside" in result["read"]
        for name in ("with gradients", "strict"):
            assert result[name].startswith("CaptureError: Branches cannot be captured as one graph")
