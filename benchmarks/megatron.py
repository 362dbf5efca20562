"""The reference that autotp is measured against: a Llama made tensor parallel by hand, as in Megatron-LM.

Plain PyTorch, written for this one architecture and knowing its names: column- and row-parallel Linears
with fused QKV and gate-up projections, rotations of queries and keys together, a vocabulary-parallel
embedding, head and cross entropy, a cache of keys and values that is allocated once, and the autograd
functions f and g of Megatron-LM (https://arxiv.org/abs/1909.08053), which are left out where no gradient is
needed. Heads, key-value heads, FFN and vocabulary must be divisible by the number of ranks.
``benchmarks/bench.py`` loads it with the dense model's weights and checks it before timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class _F(torch.autograd.Function):
    """Nothing forward, all-reduce backward: where whole values enter a parallel region."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad


class _G(torch.autograd.Function):
    """All-reduce forward, in place, nothing backward: where pending sums leave a parallel region."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _enter(x: torch.Tensor) -> torch.Tensor:
    return _F.apply(x) if torch.is_grad_enabled() else x


def _reduce(x: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        return _G.apply(x)
    dist.all_reduce(x)
    return x


class _CrossEntropy(torch.autograd.Function):
    """The losses of rows of logits of which each rank holds an even block of the classes."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, start: int, ignore: int) -> torch.Tensor:
        top = logits.amax(-1)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        exp = (logits - top.unsqueeze(-1)).exp_()
        local = target - start
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(elsewhere, 0)
        chosen = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1).sub_(top).masked_fill_(elsewhere, 0)
        dist.all_reduce(chosen)
        total = exp.sum(-1)
        dist.all_reduce(total)
        ignored = target == ignore
        ctx.save_for_backward(exp.div_(total.unsqueeze(-1)), local, elsewhere, ignored)
        return (total.log() - chosen).masked_fill_(ignored, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        softmax, local, elsewhere, ignored = ctx.saved_tensors
        softmax.scatter_add_(-1, local.unsqueeze(-1), -(~elsewhere).to(softmax.dtype).unsqueeze(-1))
        return softmax.mul_(grads[0].masked_fill(ignored, 0).unsqueeze(-1)), None, None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Cache:
    """This rank's keys and values of each layer, allocated once for the longest sequence.

    Attributes:
        length: how many positions are filled.
    """

    def __init__(self, layers: int, batch: int, heads: int, longest: int, size: int) -> None:
        self.length = 0
        shape = (batch, heads, longest, size)
        self._keys = [torch.empty(shape) for _ in range(layers)]
        self._values = [torch.empty(shape) for _ in range(layers)]

    def add(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new positions behind the filled ones; all of a layer. ``length`` counts them later, for all layers."""
        keys, values, end = self._keys[layer], self._values[layer], self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]


class Block(nn.Module):
    """One decoder layer's part on this rank; sizes are local."""

    def __init__(self, number: int, hidden: int, heads: int, kv_heads: int, size: int, ffn: int, eps: float) -> None:
        super().__init__()
        self.number, self.heads, self.kv_heads, self.size = number, heads, kv_heads, size
        self.norm1 = nn.RMSNorm(hidden, eps)
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * size, bias=False)
        self.out = nn.Linear(heads * size, hidden, bias=False)
        self.norm2 = nn.RMSNorm(hidden, eps)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        batch, sequence, _ = x.shape
        qkv = self.qkv(_enter(self.norm1(x))).view(batch, sequence, -1, self.size).transpose(1, 2)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q, k = _rotated(qk, cos, sin).split((self.heads, self.kv_heads), dim=1)
        if cache is not None:
            k, v = cache.add(self.number, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=sequence > 1, enable_gqa=True)
        x = x + _reduce(self.out(mixed.transpose(1, 2).reshape(batch, sequence, -1)))
        gate, up = self.gate_up(_enter(self.norm2(x))).chunk(2, dim=-1)
        return x + _reduce(self.down(F.silu(gate) * up))


class MegatronLlama(nn.Module):
    """A Llama's part on one rank of the default process group.

    Args:
        config: transformers' LlamaConfig.
        rank: this rank.
        tp: the number of ranks.
    """

    def __init__(self, config: Any, rank: int, tp: int) -> None:
        super().__init__()
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
            if getattr(config, name) % tp:
                raise ValueError(f"the hand-written model needs {name}={getattr(config, name)} divisible by {tp}")
        self.rank, self.tp, self.words = rank, tp, config.vocab_size // tp
        size = config.hidden_size // config.num_attention_heads
        local = (config.num_attention_heads // tp, config.num_key_value_heads // tp, size)
        ffn, eps = config.intermediate_size // tp, config.rms_norm_eps
        self.embedding = nn.Embedding(self.words, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(i, config.hidden_size, *local, ffn, eps) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps)
        self.head = nn.Linear(config.hidden_size, self.words, bias=False)
        base = config.rope_parameters["rope_theta"]
        frequencies = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def parts(self, dense: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's parts, one by one, of tensors (weights or gradients) by their names in transformers' Llama."""

        def rows(name: str) -> torch.Tensor:
            return dense(name).chunk(self.tp, 0)[self.rank]

        def columns(name: str) -> torch.Tensor:
            return dense(name).chunk(self.tp, 1)[self.rank]

        yield "embedding.weight", rows("model.embed_tokens.weight")
        yield "norm.weight", dense("model.norm.weight")
        yield "head.weight", rows("lm_head.weight")
        for i in range(len(self.blocks)):
            mine, its = f"blocks.{i}", f"model.layers.{i}"
            attention, mlp = f"{its}.self_attn", f"{its}.mlp"
            yield f"{mine}.norm1.weight", dense(f"{its}.input_layernorm.weight")
            yield f"{mine}.qkv.weight", torch.cat([rows(f"{attention}.{x}_proj.weight") for x in "qkv"])
            yield f"{mine}.out.weight", columns(f"{attention}.o_proj.weight")
            yield f"{mine}.norm2.weight", dense(f"{its}.post_attention_layernorm.weight")
            yield f"{mine}.gate_up.weight", torch.cat([rows(f"{mlp}.{x}_proj.weight") for x in ("gate", "up")])
            yield f"{mine}.down.weight", columns(f"{mlp}.down_proj.weight")

    def load(self, dense: Callable[[str], torch.Tensor]) -> None:
        """Take this rank's parts of weights, one at a time."""
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, part in self.parts(dense):
                own.pop(name).copy_(part)
        assert not own, f"no weights for {', '.join(own)}"

    def cache(self, batch: int, longest: int) -> Cache:
        """An empty cache."""
        block = self.blocks[0]
        return Cache(len(self.blocks), batch, block.kv_heads, longest, block.size)

    def hidden(self, ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """The last hidden states, on every rank; of what follows the filled positions of a cache, if there is one."""
        local = ids - self.rank * self.words
        elsewhere = (local < 0) | (local >= self.words)
        x = self.embedding(local.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0)
        x = _reduce(x)
        start = cache.length if cache is not None else 0
        end = start + ids.shape[1]
        cos, sin = self.cos[start:end], self.sin[start:end]
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def last_logits(self, ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """The whole logits of the last position, on every rank; no gradients.

        With a cache, ``ids`` are all positions so far, or the one token that follows the filled ones.
        """
        local = self.head(self.hidden(ids, cache)[:, -1:])
        parts = [torch.empty_like(local) for _ in range(self.tp)]
        dist.all_gather(parts, local)
        return torch.cat(parts, -1)

    def loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy of the next token, on every rank."""
        logits = self.head(_enter(self.hidden(ids)))
        target = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        losses = _CrossEntropy.apply(logits.view(-1, self.words), target, self.rank * self.words, -100)
        return losses.sum() / (target != -100).sum()
