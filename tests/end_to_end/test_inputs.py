"""Inputs beyond token ids and outputs beyond logits, of models from transformers.

Each model is captured once with the first call, and must be right for the others on the same graph: their
masks, positions and sizes differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp.capture.captured_graph import DenseShapes
from autotp.runtime.graph_cache import GraphCache
from autotp.verification.measure import Float64
from autotp.verification.report import Report
from autotp.verification.simulation import Simulation
from autotp.verification.verify import compare
from tests.passes.harness import COLLECTIVES, called, scrambled

CLOSE = 1e-8
"""A gradient that is zero but for rounding (a key bias's) is measured against a millionth of the largest one."""
SIZES = {"vocab_size": 1001, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
Call = dict[str, Any]


def llama(attention: str = "sdpa") -> nn.Module:
    """Its two key-value heads are fewer than the three ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=97, attn_implementation=attention)
    return scrambled(LlamaForCausalLM(config)).eval()


def bert(attention: str = "sdpa") -> nn.Module:
    from transformers import BertConfig, BertModel

    return scrambled(BertModel(BertConfig(**SIZES, intermediate_size=101, attn_implementation=attention))).eval()


def t5(attention: str = "sdpa") -> nn.Module:
    """Its five heads are odd, and its tables of relative positions per head."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=1001, d_model=64, d_kv=8, d_ff=97, num_layers=2, num_heads=5, decoder_start_token_id=0)
    config._attn_implementation = attention
    return scrambled(T5ForConditionalGeneration(config)).eval()


LLAMA = {f"self_attn.{n}_proj": 1 if n == "o" else 0 for n in "qkvo"} | {
    "mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1
}  # fmt: skip
BERT = {f"attention.self.{n}": 0 for n in ("query", "key", "value")} | {
    "attention.output.dense": 1, "intermediate.dense": 0, "output.dense": 1
}  # fmt: skip
T5 = {f"SelfAttention.{n}": 1 if n == "o" else 0 for n in "qkvo"} | {"DenseReluDense.wi": 0, "DenseReluDense.wo": 1}


def compared(
    model: nn.Module, calls: list[Call], split: Mapping[str, int], collectives: Mapping[str, int], tp: int = 3
) -> Report:
    """Compare each call on one graph, in which all weights whose names end so are split; the last report."""
    with Float64():
        programs = GraphCache(model, tp, DenseShapes.of(model))
        parallel = Simulation(model, tp, programs, record=True)
        for call in calls:
            report = compare(model, parallel, (), call, CLOSE)
            assert report.ok, str(report)
    assert programs.captures.count == 1
    program = programs.last
    assert program is not None
    for end, dim in split.items():
        found = [n for n, _ in model.named_parameters() if n.endswith(f"{end}.weight")]
        assert found, end
        assert {
            n: program.weight_layouts[n].shards[0][0] for n in found if n in program.weight_layouts
        } == dict.fromkeys(found, dim)
    assert called(program.graph, COLLECTIVES) == dict(collectives)
    return report


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(1, 1000, (batch, length), generator=torch.Generator().manual_seed(batch))


def padded(batch: int, length: int, left: bool) -> Tensor:
    """A mask with another number of padding tokens in each row."""
    place, fewer = torch.arange(length), torch.arange(batch)[:, None] * 2
    return ((place >= fewer) if left else (place < length - fewer)).long()


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def embeds(batch: int, length: int) -> Tensor:
    made = torch.randn(batch, length, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
    return made.requires_grad_()


def additive(batch: int, length: int) -> Tensor:
    """A mask in four dims in which each row sees back another distance."""
    far = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (far >= 0) & (far < 3 + torch.arange(batch)[:, None, None])
    hidden = torch.zeros(batch, length, length, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    return hidden[:, None]


def twice(make: Callable[[int, int], Call]) -> list[Call]:
    """Two calls of one structure."""
    return [make(3, 9), make(2, 8)]


TOKENS = {"all_reduce": 5, "all_gather": 1}
"""Words, and two each layer; logits are gathered."""

INPUTS: dict[str, Callable[[int, int], Call]] = {
    "left padding": lambda b, n: {"input_ids": ids(b, n), "attention_mask": padded(b, n, left=True)},
    "right padding": lambda b, n: {"input_ids": ids(b, n), "attention_mask": padded(b, n, left=False)},
    "a mask in four dims": lambda b, n: {"input_ids": ids(b, n), "attention_mask": additive(b, n)},
    "positions with gaps": lambda b, n: {
        "input_ids": ids(b, n), "attention_mask": torch.ones(b, n).long(), "position_ids": torch.arange(n)[None] * b
    },
    "positions that begin again": lambda b, n: {
        "input_ids": ids(b, n), "position_ids": torch.cat([torch.arange(n - b), torch.arange(b)])[None]
    },
    "positions counted by the mask": lambda b, n: {
        "input_ids": ids(b, n), "attention_mask": padded(b, n, left=True), "position_ids": positions(padded(b, n, True))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_masks_and_positions(name: str) -> None:
    calls = [call | {"use_cache": False} for call in twice(INPUTS[name])]
    attention = "eager" if "positions" in name else "sdpa"
    compared(llama(attention), calls, LLAMA | {"embed_tokens": 0, "lm_head": 0}, TOKENS)


def test_embeddings_given_get_their_gradient() -> None:
    calls = twice(lambda b, n: {"inputs_embeds": embeds(b, n), "use_cache": False})
    report = compared(llama(), calls, LLAMA | {"lm_head": 0}, TOKENS | {"all_reduce": 4})
    assert [n for n in report.gradients if n.startswith("input")] == ["input 0"]


def test_hidden_states_are_results_too() -> None:
    calls = twice(lambda b, n: {"input_ids": ids(b, n), "output_hidden_states": True, "use_cache": False})
    report = compared(llama(), calls, LLAMA | {"embed_tokens": 0, "lm_head": 0}, TOKENS)
    assert sum("hidden_states" in n for n in report.outputs) == 3


def test_attentions_are_results_too() -> None:
    calls = twice(lambda b, n: {"input_ids": ids(b, n), "output_attentions": True, "use_cache": False})
    report = compared(llama("eager"), calls, LLAMA | {"embed_tokens": 0, "lm_head": 0}, TOKENS | {"all_gather": 3})
    assert sum("attentions" in n for n in report.outputs) == 2


class Only(nn.Module):
    """A model of whose results only some are returned, so that all gradients come from them."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, **inputs: Any) -> Any:
        return getattr(self.model(**inputs), self.name)


@pytest.mark.parametrize("name", ["attentions", "hidden_states"])
def test_gradients_that_come_from_inside_only(name: str) -> None:
    calls = twice(lambda b, n: {"input_ids": ids(b, n), f"output_{name}": True})
    collectives = {"attentions": {"all_reduce": 3, "all_gather": 2}, "hidden_states": {"all_reduce": 5}}[name]
    split = {"word_embeddings": 0, "attention.self.query": 0, "attention.self.key": 0}
    report = compared(Only(bert("eager"), name), calls, split, collectives)
    assert "model.encoder.layer.1.attention.self.query.weight" in report.gradients


def test_segments_and_padding() -> None:
    def call(batch: int, length: int) -> Call:
        mask = padded(batch, length, left=False)
        segments = (torch.arange(length) > torch.arange(batch)[:, None] + 2).long()
        return {"input_ids": ids(batch, length), "attention_mask": mask, "token_type_ids": segments,
                "position_ids": torch.arange(length).roll(1)[None]}  # fmt: skip

    compared(bert(), twice(call), BERT | {"word_embeddings": 0}, TOKENS)


def test_bert_returns_everything() -> None:
    def call(batch: int, length: int) -> Call:
        return {"inputs_embeds": embeds(batch, length), "attention_mask": padded(batch, length, left=True),
                "output_hidden_states": True, "output_attentions": True}  # fmt: skip

    report = compared(bert("eager"), twice(call), BERT, TOKENS | {"all_gather": 3})
    assert {"input 0"} < set(report.gradients)


def target(batch: int, length: int, **more: Any) -> Call:
    """What a decoder gets; its length is not the encoder's."""
    mask = padded(batch, length - 2, left=False)
    return {"decoder_input_ids": ids(batch, length - 2), "decoder_attention_mask": mask, "use_cache": False, **more}


def test_encoder_and_decoder() -> None:
    def call(batch: int, length: int) -> Call:
        source = {"input_ids": ids(batch, length), "attention_mask": padded(batch, length, left=False)}
        return source | target(batch, length)

    compared(t5(), twice(call), T5 | {"relative_attention_bias": 1}, {"all_reduce": 12, "all_gather": 1})


def encoded(batch: int, length: int, **more: Any) -> Call:
    from transformers.modeling_outputs import BaseModelOutput

    given = BaseModelOutput(last_hidden_state=embeds(batch, length))
    mask = padded(batch, length, left=True)
    return {"encoder_outputs": given, "attention_mask": mask} | target(batch, length, **more)


ENCODED = {"EncDecAttention.k": 0, "EncDecAttention.o": 1}


def test_encoder_outputs_given_get_their_gradient() -> None:
    report = compared(t5(), twice(encoded), ENCODED, {"all_reduce": 7, "all_gather": 1})
    assert any(n.startswith("input") for n in report.gradients)


def test_cross_attentions_are_results_too() -> None:
    calls = twice(lambda b, n: encoded(b, n, output_attentions=True, output_hidden_states=True))
    report = compared(t5("eager"), calls, ENCODED, {"all_reduce": 7, "all_gather": 5})
    assert sum("cross_attentions" in n for n in report.outputs) == 2
