"""Models without weights, of which each rank reads its share: dense against parallel, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autotp
from autotp.verification.measure import Float64
from autotp.weights.checkpoint import open_checkpoint
from tests.models import make
from tests.processes import Ran, results_of
from tests.weights import ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints."""
    from safetensors.torch import save_file

    made = tmp_path_factory.mktemp("checkpoints")
    with Float64():
        make("llama")[0].save_pretrained(made / "llama", max_shard_size="500KB")
        make("neox")[0].save_pretrained(made / "neox")
        state = make("gpt")[0].state_dict()
        del state["wte.weight"]
        torch.save({n: t if t.dim() < 2 else t.t().contiguous().t() for n, t in state.items()}, made / "gpt.pt")
        state = make("gpt2")[0].state_dict()
        del state["lm_head.weight"]
        save_file(state, made / "gpt2.safetensors")
    save_file(ranks.Table().state_dict(), made / "table.safetensors")
    assert (made / "llama" / "model.safetensors.index.json").is_file()
    return made


@pytest.fixture(scope="module")
def loaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(4, ranks.loaded, tmp_path_factory, folder)


@pytest.fixture(scope="module")
def refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.refused, tmp_path_factory, folder)


@pytest.mark.parametrize("name", [*ranks.FILES, "mapping and plan", "in place of others"])
def test_outputs_every_gradient_and_the_state_are_the_dense_models(loaded: Ran, name: str) -> None:
    for result in loaded:
        assert result[name]["error"] < 1e-10
        assert result[name]["state"]
        assert result[name]["only its share"]
        assert result[name]["captures"] == 1, "the graph that was made without weights does"


def test_a_rank_reads_its_share_in_pieces_and_no_more(loaded: Ran) -> None:
    for result in loaded:
        assert result["read beyond its share"] == []
        assert result["pieces"] > 10
        assert result["control: read whole"] > 10


@pytest.mark.parametrize("name", ranks.FILES)
def test_a_rank_reads_its_share_of_files_and_no_more(loaded: Ran, name: str) -> None:
    for result in loaded:
        count, share, whole = result[f"{name}: bytes"]
        assert share <= count <= 1.05 * share
        assert share < 0.6 * whole, "negative control"


def test_a_checkpoint_with_another_weight_gives_other_numbers(loaded: Ran) -> None:
    """The negative control."""
    assert all(result["control: one weight differs"] > 1e-6 for result in loaded)


def test_what_comes_after(loaded: Ran) -> None:
    for result in loaded:
        assert result["loaded again"] < 1e-10
        assert result["gradients are kept"]
        assert result["cast"] < 1e-10
        assert result["dtypes"] == {torch.float64}


SAID = {
    "missing": "WeightsError: the weights do not fit this Table:\n  missing: scale, up.weight\n",
    "unexpected": "unexpected: bias\n",
    "shape": "different: up.weight has shape (16, 32) there, (32, 16) in the model",
    "kind": "different: up.weight is of torch.int8 there, of torch.float32 in the model",
    "no tensor": "epoch is a int, not a tensor",
    "ranks differ": "up.weight in the weights: (32, 16) torch.float64 on rank 0, (32, 16) torch.float32 on rank 1",
    "values differ": "first elements of up.weight in the weights: ",
    "no file on one rank": "nowhere.safetensors",
    "cut short": "it is cut short",
    "without weights": "up.weight is on the meta device: pass weights=",
    "in parts": "load the dense model, and parallelize it without weights=",
    "buffer": "the buffer table is on the meta device and not persistent",
    "while reading, on one rank": "the disk is gone",
}


@pytest.mark.parametrize("name", SAID)
def test_what_does_not_fit_is_said_on_all_ranks_and_changes_nothing(refused: Ran, name: str) -> None:
    for result in refused:
        assert SAID[name] in result[name]
        assert not result[name].startswith("changed")


def test_the_file_that_transformers_would_take_is_taken(folder: Path, tmp_path: Path) -> None:
    """One file before an index, which may have been left by an earlier save of more."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        content = (folder / "table.safetensors").read_bytes() if name.endswith("s") else b'{"weight_map": {"a": "b"}}'
        (tmp_path / name).write_bytes(content)
    assert set(open_checkpoint(tmp_path)) == set(ranks.Table().state_dict())


def test_models_that_have_their_weights_go_to_a_device(folder: Path) -> None:
    """As far as there is one: the CPU."""
    x, dense = torch.ones(3, 16), ranks.Table()
    model = ranks.Table()
    model.load_state_dict(dense.state_dict())
    autotp.parallelize(model, 1, example_inputs=(x,), device="cpu")
    assert torch.allclose(model(x), dense(x), atol=1e-6)
    with autotp.empty_weights():
        model = ranks.Table()
    autotp.parallelize(model, 1, example_inputs=(x,), device="cpu", weights=folder / "table.safetensors")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_then_all_can_go_on(refused: Ran) -> None:
    assert all(result["then"] < 1e-6 for result in refused)
