"""Work on real processes: models whose classes change what is in a checkpoint, and one captured in parts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import autotp
from tests.partition.ranks import trouble
from tests.saving.ranks import differing, once

Result = dict[str, Any]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
INPUTS = {"input_ids": torch.arange(12).view(2, 6), "use_cache": False}


class OwnLlama(LlamaForCausalLM):
    """A class as remote code has them: with arguments of its own, and a weight that is not saved."""

    _keys_to_ignore_on_save = ("model.norm.weight",)

    def save_pretrained(self, save_directory: Any, *args: Any, note: str = "none", **kwargs: Any) -> None:
        """Write a note, too."""
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, "note").write_text(note)


def _own() -> Any:
    torch.manual_seed(0)
    return OwnLlama(LlamaConfig(intermediate_size=67, num_key_value_heads=2, **SMALL))


def _experts() -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, num_key_value_heads=2, head_dim=8, **SMALL
    )
    return Qwen3MoeForCausalLM(config)


def classes(rank: int, world: int, folder: Path) -> Result:
    """Which files differ from the dense model's, or what is read back where the names in files are others."""
    result: Result = {}
    dense, model = _own(), autotp.parallelize(_own(), world, example_inputs=INPUTS)
    once(rank, dense.save_pretrained, folder / "dense own", note="ours")
    model.save_pretrained(folder / "own", note="ours")  # type: ignore[operator]
    result["own class"] = differing(folder / "dense own", folder / "own")
    result["left out"] = "model.norm.weight" not in load_file(folder / "own" / "model.safetensors")
    dense, model = _experts(), autotp.parallelize(_experts(), world, example_inputs=INPUTS)
    once(rank, dense.save_pretrained, folder / "dense experts")
    autotp.save(model, folder / "experts")
    result["names are others"] = differing(folder / "dense experts", folder / "experts")
    loaded, state = type(dense).from_pretrained(folder / "experts"), dense.state_dict()
    result["experts"] = [n for n, x in loaded.state_dict().items() if not torch.equal(x, state[n])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense, model, x = trouble(rank, world)
    autotp.save(model, folder / "parts")
    with torch.no_grad():
        model(x)
    autotp.save(model, folder / "parts again")
    read, state = load_file(folder / "parts" / "model.safetensors"), dense.state_dict()
    result["in parts"] = [n for n, t in state.items() if n not in read or not torch.equal(read[n], t)]
    result["in parts, after a call"] = differing(folder / "parts", folder / "parts again")
    return result
