"""model: build the models that recipes describe: plain modules, written as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autotp.fuzz.recipe import Recipe

__all__ = ["Transformer", "build"]


class Product(nn.Module):
    """``x @ weight.T + bias``, written in one of several ways."""

    def __init__(self, inputs: int, outputs: int, how: str, bias: bool) -> None:
        super().__init__()
        self.how = how
        shape = (inputs, outputs) if how == "conv1d" else (outputs, inputs)
        self.weight = nn.Parameter(torch.randn(shape) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.randn(outputs) / 4) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "linear":
            return F.linear(x, self.weight, self.bias)
        if self.how == "conv1d" and self.bias is not None:
            out = self.weight.shape[1]
            return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], out)
        if self.how == "conv1d":
            return x @ self.weight
        y = x @ self.weight.T if self.how == "transposed" else torch.einsum("...i,oi->...o", x, self.weight)
        return y if self.bias is None else y + self.bias


class HandNorm(nn.Module):
    """An RMS norm written by hand, as in the first LLaMA code."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _norm(recipe: Recipe, size: int) -> nn.Module:
    if recipe.norm == "by hand":
        return HandNorm(size)
    return nn.LayerNorm(size) if recipe.norm == "layer" else nn.RMSNorm(size, eps=1e-6)


def _rotate(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Queries or keys ``(batch, heads, length, head size)`` with rotary embeddings applied."""
    size = x.shape[-1] // 2 if recipe.positions == "rotary half" else x.shape[-1]
    rotary, rest = x[..., :size], x[..., size:]
    rate = 1.0 / 100 ** (torch.arange(0, size, 2, device=x.device, dtype=x.dtype) / size)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * rate
    if recipe.positions == "rotary pairs":
        angle = angle.repeat_interleave(2, dim=-1)
        quarter_turn = torch.stack((-rotary[..., 1::2], rotary[..., ::2]), dim=-1).flatten(-2)
    else:
        angle = torch.cat((angle, angle), dim=-1)
        first, second = rotary.chunk(2, dim=-1)
        quarter_turn = torch.cat((-second, first), dim=-1)
    rotated = rotary * angle.cos() + quarter_turn * angle.sin()
    return torch.cat((rotated, rest), dim=-1) if size < x.shape[-1] else rotated


class Attention(nn.Module):
    """Attention of tokens to each other, or to a memory."""

    slopes: torch.Tensor

    def __init__(self, recipe: Recipe, cross: bool = False) -> None:
        super().__init__()
        self.recipe, self.cross = recipe, cross
        size, width = recipe.head_size, recipe.width
        queries, keys = recipe.heads * size, recipe.kv_heads * size
        self.fused = recipe.fused if not cross or recipe.fused in ("apart", "pair") else "apart"

        def product(outputs: int, inputs: int = width, bias: bool = recipe.bias) -> Product:
            return Product(inputs, outputs, recipe.weights, bias)

        if self.fused == "apart":
            self.q, self.k, self.v = product(queries), product(keys), product(keys)
        elif self.fused == "pair":
            self.q, self.kv = product(queries), product(2 * keys)
        else:
            self.qkv = product(queries + 2 * keys)
        if recipe.qk_norm != "none":
            over_all_heads = recipe.qk_norm == "full"
            self.q_norm = _norm(recipe, queries if over_all_heads else size)
            self.k_norm = _norm(recipe, keys if over_all_heads else size)
        if recipe.gate != "none":
            self.gate = product(queries if recipe.gate == "feature" else recipe.heads)
        if recipe.scores == "sinks":
            self.sinks = nn.Parameter(torch.randn(recipe.heads))
        if recipe.positions == "alibi" and not cross:
            self.register_buffer("slopes", 2.0 ** -torch.arange(1, recipe.heads + 1).float())
        self.out = product(width, queries)

    def project(self, x: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values ``(batch, heads, length, head size)``; keys and values have fewer heads."""
        recipe, (batch, length, _) = self.recipe, x.shape
        groups, queries, size = recipe.kv_heads, recipe.queries, recipe.head_size
        if self.fused in ("apart", "pair"):
            q = self.q(x)
            k, v = (self.k(memory), self.v(memory)) if self.fused == "apart" else self.kv(memory).chunk(2, dim=-1)
            if recipe.qk_norm == "full":
                q, k = self.q_norm(q), self.k_norm(k)
            q = q.view(batch, length, -1, size)
            k, v = (t.view(batch, memory.shape[1], groups, size) for t in (k, v))
        elif self.fused == "side by side":
            q, k, v = self.qkv(x).split([groups * queries * size, groups * size, groups * size], dim=-1)
            q, k, v = (t.view(batch, length, -1, size) for t in (q, k, v))
        elif self.fused == "by group":
            lanes = self.qkv(x).view(batch, length, groups, queries + 2, size)
            q, k, v = lanes[..., :queries, :].flatten(2, 3), lanes[..., -2, :], lanes[..., -1, :]
        else:
            q, k, v = self.qkv(x).view(batch, length, groups, -1).split([queries * size, size, size], dim=-1)
            q = q.reshape(batch, length, groups * queries, size)
        if recipe.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if recipe.positions.startswith("rotary") and not self.cross:
            q, k = _rotate(q, recipe), _rotate(k, recipe)
        return q, k, v

    def repeated(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values, each head repeated for the queries that share it."""
        queries, (batch, groups, length, size) = self.recipe.queries, x.shape
        if queries == 1 or self.recipe.repeat == "enable_gqa":
            return x
        if self.recipe.repeat == "repeat_interleave":
            return x.repeat_interleave(queries, dim=1)
        x = x[:, :, None].expand(batch, groups, queries, length, size)
        return x.reshape(batch, groups * queries, length, size)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The scores of all pairs: ``(batch, heads, length, length of the memory)``."""
        recipe, scale = self.recipe, self.recipe.head_size**-0.5
        if recipe.repeat == "grouped":
            q = q.unflatten(1, (recipe.kv_heads, recipe.queries))
            return (q @ k.unsqueeze(2).transpose(-2, -1) * scale).flatten(1, 2)
        k = self.repeated(k)
        if recipe.attention == "einsum":
            return torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
        if recipe.attention == "baddbmm":
            shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            empty = q.new_zeros(1, 1, 1)
            flat = torch.baddbmm(empty, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
            return flat.view(shape)
        return q @ k.transpose(-2, -1) * scale

    def weighted_sums(self, weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The values' weighted sums: ``(batch, heads, length, head size)``."""
        recipe = self.recipe
        if recipe.repeat == "grouped":
            weights = weights.unflatten(1, (recipe.kv_heads, recipe.queries))
            return (weights @ v.unsqueeze(2)).flatten(1, 2)
        v = self.repeated(v)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v) if recipe.attention == "einsum" else weights @ v

    def forward(self, x: torch.Tensor, memory: torch.Tensor, allowed: Any, bias: Any) -> torch.Tensor:
        recipe = self.recipe
        q, k, v = self.project(x, memory)
        if recipe.positions == "alibi" and not self.cross:
            steps = torch.arange(k.shape[2], device=x.device)
            bias = self.slopes[:, None, None] * (steps[None, :] - steps[:, None]).to(x.dtype)
        if allowed is not None and (recipe.written == "additive" or bias is not None):
            closed = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device)
            closed = closed.masked_fill(~allowed, torch.finfo(x.dtype).min)
            bias, allowed = closed if bias is None else bias + closed, None
        if recipe.attention == "sdpa":
            mask = bias if allowed is None else allowed
            k, v = self.repeated(k), self.repeated(v)
            grouped = recipe.repeat == "enable_gqa" and recipe.queries > 1
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        else:
            scores = self.scores(q, k)
            if recipe.scores == "capped":
                scores = 3 * torch.tanh(scores / 3)
            if bias is not None:
                scores = scores + bias
            if allowed is not None and recipe.written == "filled":
                scores = scores.masked_fill(~allowed, torch.finfo(x.dtype).min)
            elif allowed is not None:
                scores = torch.where(allowed, scores, torch.finfo(x.dtype).min)
            if recipe.scores == "sinks":
                sinks = self.sinks[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
                weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
            else:
                weights = scores.softmax(-1)
            y = self.weighted_sums(weights, v)
        y = y.transpose(1, 2)
        if recipe.gate == "head":
            y = y * self.gate(x).sigmoid().unsqueeze(-1)
        y = y.reshape(x.shape[0], x.shape[1], -1)
        if recipe.gate == "feature":
            y = y * self.gate(x).sigmoid()
        return self.out(y)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "squared relu": lambda x: F.relu(x).square(),
}


class MLP(nn.Module):
    """An MLP, gated or not."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.kind, self.activation = recipe.mlp, recipe.activation
        wide = recipe.ffn if recipe.mlp in ("plain", "gated") else 2 * recipe.ffn
        self.up = Product(recipe.width, wide, recipe.weights, recipe.bias)
        if recipe.mlp == "gated":
            self.gate = Product(recipe.width, wide, recipe.weights, recipe.bias)
        self.down = Product(recipe.ffn, recipe.width, recipe.weights, recipe.bias)

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation."""
        return ACTIVATIONS[self.activation](x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        if self.kind == "plain":
            return self.down(self.activate(up))
        if self.kind == "gated":
            return self.down(self.activate(self.gate(x)) * up)
        if self.kind == "gated side by side":
            gate, up = up.chunk(2, dim=-1)
        else:
            gate, up = up[..., ::2], up[..., 1::2]
        return self.down(self.activate(gate) * up)


class Block(nn.Module):
    """Attention, attention to a memory if the recipe has it, and an MLP."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.attention, self.mlp = Attention(recipe), MLP(recipe)
        steps = 2 + recipe.cross
        self.norms = nn.ModuleList(_norm(recipe, recipe.width) for _ in range(1 if recipe.parallel else steps))
        if recipe.cross:
            self.across = Attention(recipe, cross=True)
        if recipe.place == "sandwich":
            self.after = nn.ModuleList(_norm(recipe, recipe.width) for _ in range(steps))

    def forward(self, x: torch.Tensor, memory: torch.Tensor, allowed: Any, bias: Any) -> torch.Tensor:
        recipe = self.recipe
        if recipe.parallel:
            y = self.norms[0](x)
            update = self.attention(y, y, allowed, bias) + self.mlp(y)
            if recipe.cross:
                update = update + self.across(y, memory, None, None)
            return x + update * recipe.residual
        steps: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda y: self.attention(y, y, allowed, bias), self.mlp]
        if recipe.cross:
            steps.insert(1, lambda y: self.across(y, memory, None, None))
        for i, step in enumerate(steps):
            y = step(x if recipe.place == "post" else self.norms[i](x))
            if recipe.place == "sandwich":
                y = self.after[i](y)
            x = x + (y * recipe.residual if recipe.residual != 1.0 else y)
            if recipe.place == "post":
                x = self.norms[i](x)
        return x


class Transformer(nn.Module):
    """The model of a recipe: from words to logits, or to a loss."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, width = recipe, recipe.width
        self.words = nn.Embedding(recipe.vocabulary, width, padding_idx=3 if recipe.embedding == "padded" else None)
        if recipe.embedding == "normed":
            self.entry = _norm(recipe, width)
        if recipe.embedding == "typed":
            self.types = nn.Embedding(2, width)
        if recipe.positions == "learnt":
            self.places = nn.Embedding(32, width)
        if recipe.positions == "relative":
            self.distances = nn.Embedding(63, recipe.heads)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.layers))
        self.final = _norm(recipe, width)
        self.head = nn.Linear(width, recipe.vocabulary, bias=recipe.bias)
        if recipe.tied:
            self.head.weight = self.words.weight

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of words and positions."""
        recipe, x = self.recipe, self.words(ids)
        steps = torch.arange(ids.shape[1], device=ids.device)
        if recipe.embedding == "scaled":
            x = x * math.sqrt(recipe.width)
        if recipe.embedding == "typed":
            x = x + self.types(ids % 2)
        if recipe.positions == "learnt":
            x = x + self.places(steps)
        if recipe.positions == "sinusoidal":
            rate = torch.arange(recipe.width, device=ids.device, dtype=x.dtype) / recipe.width
            x = x + torch.sin(steps[:, None].to(x.dtype) * torch.exp(-3 * rate))
        return self.entry(x) if recipe.embedding == "normed" else x

    def allowed(self, ids: torch.Tensor, mask: Any) -> Any:
        """A boolean mask of the pairs that may attend; None if all may."""
        recipe, steps = self.recipe, torch.arange(ids.shape[1], device=ids.device)
        if recipe.mask == "none":
            return None
        allowed = None
        if "padding" in recipe.mask:
            allowed = mask[:, None, None, :].bool()
        if recipe.mask != "padding":
            causal = steps[None, :] <= steps[:, None]
            if recipe.mask == "window":
                causal = causal & (steps[None, :] > steps[:, None] - 3)
            allowed = causal if allowed is None else allowed & causal
        return allowed

    def forward(self, ids: torch.Tensor, mask: Any = None, labels: Any = None) -> Any:
        recipe, x = self.recipe, self.embedded(ids)
        memory, bias = x.flip(1), None
        if recipe.positions == "relative":
            steps = torch.arange(ids.shape[1], device=ids.device)
            bias = self.distances(steps[None, :] - steps[:, None] + 31).permute(2, 0, 1).unsqueeze(0)
        allowed = self.allowed(ids, mask)
        for block in self.blocks:
            x = block(x, memory, allowed, bias)
        logits = self.head(self.final(x))
        if labels is None:
            return logits
        if recipe.loss == "shifted":
            rows, targets = logits[:, :-1].reshape(-1, recipe.vocabulary), labels[:, 1:].reshape(-1)
            return F.cross_entropy(rows, targets), logits
        if recipe.loss == "log softmax":
            rows = logits.log_softmax(-1).view(-1, recipe.vocabulary)
            return F.nll_loss(rows, labels.view(-1))
        if recipe.loss == "classes second":
            return F.cross_entropy(logits.transpose(1, 2), labels)
        return F.cross_entropy(logits.view(-1, recipe.vocabulary), labels.view(-1))


def build(recipe: Recipe, seed: int = 0) -> tuple[Transformer, dict[str, torch.Tensor]]:
    """Build the model of a recipe, in float64 and eval mode, and inputs for it.

    All parameters are disturbed a little, so that no norm's weight is one and no bias zero.
    """
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = Transformer(recipe).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        ids = torch.randint(0, recipe.vocabulary, (recipe.batch, recipe.length))
        inputs = {"ids": ids}
        if "padding" in recipe.mask:
            mask = torch.ones(recipe.batch, recipe.length, dtype=torch.long)
            mask[0, recipe.length // 2 + 1 :] = 0
            inputs["mask"] = mask
        if recipe.loss != "none":
            inputs["labels"] = (ids + 1) % recipe.vocabulary
    finally:
        torch.random.set_rng_state(state)
    return model, inputs
