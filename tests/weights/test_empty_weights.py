"""Models without weights: they have their ties, buffers and attributes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autotp
from tests.models import SmallGPT, make
from tests.processes import results_of
from tests.weights import ranks_checkpoint


def test_models_without_weights_have_their_ties_buffers_and_attributes() -> None:
    with autotp.empty_weights():
        model = SmallGPT()
        batch = nn.BatchNorm1d(4)
    assert model.head.weight is model.wte.weight
    assert model.wte.weight.is_meta
    assert batch.running_var.tolist() == [1.0] * 4
    assert not nn.Linear(2, 2).weight.is_meta, "afterwards all is as before"
    shared = nn.Parameter(torch.ones(3), requires_grad=False)
    shared.tag = "kept"
    with autotp.empty_weights():
        model = nn.ParameterList([shared, shared, nn.Parameter(torch.ones(3))])
    assert model[0] is model[1]
    assert model[2] is not model[0]
    assert (model[0].tag, model[0].requires_grad) == ("kept", False)


def test_a_transformers_model_without_weights_has_its_buffers() -> None:
    dense, _ = make("llama")
    with autotp.empty_weights():
        model, _ = make("llama")
    buffers = dict(dense.named_buffers())
    assert buffers
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def _saved(folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    """A model of transformers with a generation config of its own."""
    import transformers

    config = transformers.LlamaConfig(num_attention_heads=6, num_key_value_heads=6, eos_token_id=7, **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.top_k, model.generation_config.do_sample = 7, True
    model.save_pretrained(folder, max_shard_size="100MB")
    return folder


@pytest.mark.parametrize(("world", "dtype"), [(2, torch.bfloat16), (3, torch.float64)])
def test_from_pretrained_without_weights_is_the_model_in_all_else(
    world: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99}
    folder = _saved(tmp_path_factory.mktemp("small"), dtype, tie_word_embeddings=world == 2, **small)
    for result in results_of(world, ranks_checkpoint.pretrained, tmp_path_factory, folder):
        assert result["empty"]
        assert result["equal"]
        assert result["buffers"]
        assert result["dtype"] == (dtype, {dtype})
        assert not result["training"]
        assert result["generation"]
        assert result["eos"] == 7
        assert result["tied"] == (world == 2)
        assert result["apart"] < (0.05 if dtype is torch.bfloat16 else 1e-6)
        assert result["generated"][1] > 8


MEASURE = """
import contextlib, sys, autotp, transformers
import transformers.models.llama.modeling_llama
def most():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = most()
with autotp.empty_weights() if sys.argv[2] == "empty" else contextlib.nullcontext():
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
if sys.argv[2] != "empty":
    sum(float(p.float().sum()) for p in model.parameters())
print(most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_from_pretrained_without_weights_needs_no_memory_for_them(tmp_path: Path) -> None:
    options = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 32000}
    folder = _saved(tmp_path, torch.bfloat16, **options)
    megabytes = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1e6
    assert megabytes > 300

    def used(how: str) -> float:
        command = [sys.executable, "-c", MEASURE, str(folder), how]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    assert used("empty") < 60
    assert used("whole") > 0.8 * megabytes, "negative control"
