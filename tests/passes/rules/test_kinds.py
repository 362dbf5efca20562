"""Kinds of models and of attention: what is split, what it costs, and that every gradient is right."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from autotp.errors import CaptureError
from autotp.program.sharded_program import shard_graph
from passes import ops
from tests.passes.harness import captured_of, check, randn, run, scrambled, sets, simulation
from tests.passes.rules.test_rules import Attention, Fused, Language, attention_split, ids

D = 64
ONE = {"all_reduce": 1}
HEADS = attention_split()
FEED = {"up.weight": 0, "up.bias": 0, "down.weight": 1}


def under(name: str, split: Mapping[str, int], *places: int | str) -> dict[str, int]:
    """What is split of modules, by its full name; ``*`` stands for each of ``places``."""
    return {f"{name.replace('*', str(p))}.{n}": d for p in places or ("",) for n, d in split.items()}


class Feed(nn.Module):
    """An MLP."""

    def __init__(self, width: int = 95, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, width, bias=bias), nn.Linear(width, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Heads(nn.Module):
    """Attention by plain products, to another value if one is given; subclasses change one thing."""

    def __init__(self, count: int = 6, size: int = 8) -> None:
        super().__init__()
        self.count, self.size = count, size
        self.q, self.k, self.v = (nn.Linear(D, count * size) for _ in range(3))
        self.o = nn.Linear(count * size, D)

    def apart(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.count, -1)).transpose(1, 2)

    def turned(self, y: Tensor) -> Tensor:
        return y

    def weighed(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def passed(self, y: Tensor, x: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor, source: Tensor | None = None, bias: Tensor | float = 0.0) -> Tensor:
        source = x if source is None else source
        q, k, v = self.apart(self.q(x)), self.apart(self.k(source)), self.apart(self.v(source))
        y = self.weighed(self.turned(q) @ self.turned(k).mT * self.size**-0.5 + bias) @ v
        return self.o(self.passed(y, x).transpose(1, 2).flatten(2))


def distances(scores: Tensor) -> Tensor:
    """How far each key lies behind each query."""
    return torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1])[None, :]


class SoftCapped(Heads):
    """Logits kept small by a tanh (Gemma-2)."""

    def weighed(self, scores: Tensor) -> Tensor:
        return (2 * torch.tanh(scores / 2)).softmax(-1)


class Sinks(Heads):
    """A learnt logit per head that takes part in the softmax and is dropped after it (gpt-oss)."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(self.count))

    def weighed(self, scores: Tensor) -> Tensor:
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[-2], -1)
        both = torch.cat([scores, sinks], -1)
        return (both - both.max(-1, keepdim=True).values).softmax(-1)[..., :-1]


class GatedFeatures(Heads):
    """A gate for every feature of every head (Qwen3-Next)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, self.count * self.size)

    def passed(self, y: Tensor, x: Tensor) -> Tensor:
        return y * self.apart(self.gate(x)).sigmoid()


class GatedHeads(GatedFeatures):
    """A gate for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, self.count, bias=False)


class FusedGate(Heads):
    """Queries and their gates in one weight, head by head (Qwen3-Next)."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, self.count * 2 * self.size)

    def forward(self, x: Tensor) -> Tensor:
        q, gate = self.apart(self.q(x)).chunk(2, -1)
        y = self.weighed(q @ self.apart(self.k(x)).mT) @ self.apart(self.v(x))
        return self.o((y * gate.sigmoid()).transpose(1, 2).flatten(2))


class Alibi(Heads):
    """Slopes per head that forward makes from their number (BLOOM, MPT)."""

    def weighed(self, scores: Tensor) -> Tensor:
        slopes = torch.pow(0.5, torch.arange(1, self.count + 1, dtype=scores.dtype))
        return (scores - slopes[:, None, None] * distances(scores).abs()).softmax(-1)


class LearntSlopes(Heads):
    """Slopes per head that are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.zeros(self.count, 1, 1))

    def weighed(self, scores: Tensor) -> Tensor:
        return (scores - self.slopes * distances(scores).abs()).softmax(-1)


class SlidingWindow(Heads):
    """Each query sees itself and the two before it."""

    def weighed(self, scores: Tensor) -> Tensor:
        far = distances(scores)
        return scores.masked_fill((far < 0) | (far > 2), float("-inf")).softmax(-1)


class Chunked(Heads):
    """Each query sees what is before it in its chunk of three (Llama-4)."""

    def weighed(self, scores: Tensor) -> Tensor:
        chunk = torch.arange(scores.shape[-1]) // 3
        seen = (distances(scores) >= 0) & (chunk[:, None] == chunk[None, :])
        return torch.where(seen, scores, torch.finfo(scores.dtype).min).softmax(-1)


class Rotary(Heads):
    """Positions as angles, of all features or of the first ones of each head only."""

    def __init__(self, part: int) -> None:
        super().__init__()
        self.part = part

    def turned(self, y: Tensor) -> Tensor:
        angle = torch.arange(y.shape[2])[:, None] / 10.0 ** torch.arange(self.part // 2, dtype=y.dtype)
        angle = torch.cat([angle, angle], -1)
        turn, rest = y[..., : self.part], y[..., self.part :]
        a, b = turn.chunk(2, -1)
        return torch.cat([turn * angle.cos() + torch.cat([-b, a], -1) * angle.sin(), rest], -1)


class ComplexRotary(Heads):
    """Pairs of features as complex numbers (the original Llama)."""

    def turned(self, y: Tensor) -> Tensor:
        angle = torch.arange(y.shape[2])[:, None] / 10.0 ** torch.arange(self.size // 2, dtype=y.dtype)
        turn = torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2)


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "soft-capped logits": (SoftCapped, {}),
    "sinks": (Sinks, {"sinks": 0}),
    "gated features": (GatedFeatures, {"gate.weight": 0, "gate.bias": 0}),
    "gated heads": (GatedHeads, {"gate.weight": 0}),
    "a gate fused with the queries": (FusedGate, {}),
    "alibi": (Alibi, {}),
    "learnt slopes": (LearntSlopes, {"slopes": 0}),
    "rotary": (lambda: Rotary(8), {}),
    "partial rotary": (lambda: Rotary(4), {}),
    "complex rotary": (ComplexRotary, {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_attention(name: str) -> None:
    make, more = KINDS[name]
    check(make(), randn(2, 7, D), split=HEADS | more, collectives=ONE, tps=(4,))


@pytest.mark.parametrize(("count", "sizes"), [(14, (32, 32, 24, 24)), (6, (16, 16, 8, 8))])
def test_heads_that_do_not_divide(count: int, sizes: tuple[int, ...]) -> None:
    program, *_ = check(Heads(count), randn(2, 5, D), split=HEADS, collectives=ONE, tps=(4,))
    assert program.weight_layouts["q.weight"].shards[0][1].counts == sizes
    assert program.weight_layouts["o.weight"].shards[0][1].counts == sizes
    assert program.weight_layouts["k.bias"].shards[0][1].disjoint


def test_an_mlp_width_that_does_not_divide() -> None:
    program, *_ = check(Feed(115), randn(2, 5, D), split=FEED, collectives=ONE, moves={"enter": 1}, tps=(4,))
    assert program.weight_layouts["up.weight"].shards[0][1].counts == (29, 29, 29, 28)


FUSED = {"qkv.weight": 0, "qkv.bias": 0, "o.weight": 1}


@pytest.mark.parametrize(
    ("order", "count", "kv", "own"),
    [("KV g+2 D", 14, 2, (4, 3, 4, 3)), ("q|k|v", 14, 2, (4, 3, 4, 3)), ("KV g+2 D", 9, 3, (2, 1, 3, 3)),
     ("q|k|v", 10, 5, (1, 1, 1, 1, 1, 1, 2, 2))],
)  # fmt: skip
def test_fused_projections_with_fewer_key_value_heads_than_ranks(
    order: str, count: int, kv: int, own: tuple[int, ...]
) -> None:
    program, *_ = check(Fused(order, count, kv), randn(2, 5, D), split=FUSED, collectives=ONE, tps=(len(own),))
    assert program.weight_layouts["o.weight"].shards[0][1].counts == tuple(8 * n for n in own)
    assert program.weight_layouts["qkv.weight"].shards[0][1].counts == tuple(8 * (n + 2) for n in own)


class BigCode(nn.Module):
    """One key and value for all heads, which are folded into the queries' sequence."""

    def __init__(self, count: int = 6, size: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, count * size), nn.Linear(D, size), nn.Linear(D, size)
        self.count, self.size, self.o = count, size, nn.Linear(count * size, D)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length * self.count, self.size)
        weights = (q @ self.k(x).mT).view(batch, length, self.count, length).softmax(-1)
        y = weights.view(batch, length * self.count, length) @ self.v(x)
        return self.o(y.view(batch, length, -1))


def test_heads_folded_into_the_sequence_of_the_queries() -> None:
    split = {"q.weight": 0, "q.bias": 0, "o.weight": 1}
    check(BigCode(), randn(2, 5, D), split=split, collectives=ONE, moves={"enter": 1}, tps=(4,))


class Grouped(Attention):
    """Keys and values are not repeated: groups of queries are a dim of their own, or one with their sequence."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.kv, -1, self.size))
        k, v = (p(x).unflatten(-1, (self.kv, self.size)) for p in (self.k, self.v))
        if self.by == "einsum":
            weights = torch.einsum("bqkgd,bskd->bkgqs", q, k).softmax(-1)
            return self.o(torch.einsum("bkgqs,bskd->bqkgd", weights, v).flatten(2))
        q, k, v = q.permute(0, 2, 3, 1, 4), k.transpose(1, 2), v.transpose(1, 2)
        if self.by == "broadcast":
            k, v = k[:, :, None], v[:, :, None]
            return self.o(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2, 4).flatten(2))
        y = ((q.flatten(2, 3) @ k.mT).softmax(-1) @ v).unflatten(2, q.shape[2:4])
        return self.o(y.permute(0, 3, 1, 2, 4).flatten(2))


@pytest.mark.parametrize("by", ["einsum", "broadcast", "folded"])
def test_groups_of_queries_that_are_a_dim_of_their_own(by: str) -> None:
    split = {f"{m}.{p}": 0 for m in "qkv" for p in ("weight", "bias")} | {"o.weight": 1}
    check(Grouped(12, 4, by=by), randn(2, 5, D), split=split, collectives=ONE, moves={"enter": 1}, tps=(2, 3, 4))
    check(Grouped(12, 2, by=by), randn(2, 5, D), tps=(4,))  # fewer groups than ranks: right


def test_gradients_of_replicated_heads_summed_over_all_ranks_would_be_wrong() -> None:
    model, x = scrambled(Attention(8, 2)), randn(2, 5, D)
    program, dense = shard_graph(captured_of(model, x), 4), run(model, model, [x])
    assert max(dense.differences(run(simulation(model, program), model, [x])).values()) < 1e-10
    replicated = [n for n in program.graph.nodes if n.target is ops.enter and n.args[1] == "tp:0,1|2,3"]
    assert replicated
    for node in replicated:
        node.args = (node.args[0], "tp")
    found = dense.differences(run(simulation(model, program), model, [x]))
    assert found["output 0"] < 1e-10
    assert {n for n, far in found.items() if far > 1e-2} == {f"gradient of {m}.weight" for m in "kv"} | {
        "gradient of v.bias"
    }


# Fused gates -------------------------------------------------------------------------------------------


class FusedFeed(nn.Module):
    """Gate and up in one weight, one behind the other (Phi-3) or alternating (gpt-oss)."""

    def __init__(self, alternating: bool) -> None:
        super().__init__()
        self.alternating, self.both, self.down = alternating, nn.Linear(D, 2 * 50), nn.Linear(50, D)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.alternating else both.chunk(2, -1)
        return self.down(F.silu(gate) * (up + 1))


@pytest.mark.parametrize("alternating", [False, True])
def test_fused_gate_and_up(alternating: bool) -> None:
    split = {"both.weight": 0, "both.bias": 0, "down.weight": 1}
    program, *_ = check(FusedFeed(alternating), randn(2, 5, D), split=split, collectives=ONE, tps=(3,))
    own = sets(program.weight_layouts["down.weight"].shards[0][1])
    assert [len(s) for s in own] == [17, 17, 16]
    pairs = [sorted([2 * i, 2 * i + 1] if alternating else [i, i + 50]) for i in range(50)]
    expected = [sorted(x for i in s for x in pairs[i]) for s in own]
    assert sets(program.weight_layouts["both.weight"].shards[0][1]) == expected


# Layers ------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention and an MLP, put together by ``form``, with four norms of which it may use some."""

    def __init__(self, form: Callable[..., Tensor], attention: nn.Module) -> None:
        super().__init__()
        self.form, self.attention, self.mlp = form, attention, Feed()
        self.a, self.b, self.c, self.d = nn.LayerNorm(D), nn.RMSNorm(D), nn.LayerNorm(D), nn.RMSNorm(D)
        self.scale, self.number = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def layers(form: Callable[..., Tensor], attention: Callable[[], nn.Module] = Heads) -> nn.Sequential:
    return nn.Sequential(*(Layer(form, attention()) for _ in range(2)))


LAYER = under("attention", HEADS) | under("mlp", FEED)
LAYERS = under("*", LAYER, 0, 1)


def one_norm(s: Layer, x: Tensor) -> Tensor:
    y = s.a(x)
    return s.attention(y) + s.mlp(y) + x


def two_norms(s: Layer, x: Tensor) -> Tensor:
    return s.mlp(s.b(x)) + s.attention(s.a(x)) + x


def mlp_first(s: Layer, x: Tensor) -> Tensor:
    y = s.a(x)
    mlp = s.mlp(y)
    mlp += s.attention(y)
    return x + mlp


PARALLEL: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module], dict[str, int]]] = {
    "gpt-j": (one_norm, Heads, HEADS),
    "gpt-neox": (two_norms, lambda: Fused("H 3 D", 6, 6), FUSED),
    "falcon": (mlp_first, lambda: Fused("H 3D", 6, 6), FUSED),
    "phi": (mlp_first, lambda: Rotary(4), HEADS),
    "stablelm": (one_norm, lambda: Attention(6, 6, norm=True), HEADS),
    "cohere": (one_norm, lambda: Attention(6, 6, bias=False), attention_split(bias=False)),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_attention_and_mlp_side_by_side_cost_one_reduction_each_way(name: str) -> None:
    form, attention, own = PARALLEL[name]
    split = under("*.attention", own, 0, 1) | under("*.mlp", FEED, 0, 1)
    check(layers(form, attention), randn(2, 5, D), split=split, collectives={"all_reduce": 2}, moves={"enter": 2},
          tps=(4,))  # fmt: skip


def post_norm(s: Layer, x: Tensor) -> Tensor:
    x = s.a(x + s.attention(x))
    return s.b(x + s.mlp(x))


def sandwich(s: Layer, x: Tensor) -> Tensor:
    x = x + s.b(s.attention(s.a(x)))
    return x + s.d(s.mlp(s.c(x)))


def norm_of_results(s: Layer, x: Tensor) -> Tensor:
    x = x + s.a(s.attention(x))
    return x + s.b(s.mlp(x))


def multipliers(s: Layer, x: Tensor) -> Tensor:
    x = x * 0.7 + s.attention(s.a(x)) * 0.22
    return x * 0.9 + s.mlp(s.b(x)) / 1.3


def learnt_multipliers(s: Layer, x: Tensor) -> Tensor:
    x = x + s.scale * s.attention(s.a(x))
    return x * s.number + s.number * s.mlp(s.b(x))


FORMS = (post_norm, sandwich, norm_of_results, multipliers, learnt_multipliers)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_layers(form: Callable[..., Tensor]) -> None:
    check(layers(form), randn(2, 5, D), split=LAYERS, collectives={"all_reduce": 4}, moves={"enter": 4}, tps=(4,))


def test_kinds_of_attention_that_differ_by_layer() -> None:
    model = nn.Sequential(*(Layer(sandwich, kind()) for kind in (SlidingWindow, Heads, Chunked)))
    check(model, randn(2, 7, D), split=under("*", LAYER, 0, 1, 2), collectives={"all_reduce": 6}, tps=(3,))


class EncoderDecoder(nn.Module):
    """One layer that encodes and two that decode, with attention to what was encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Layer(post_norm, Heads())
        self.decoder = nn.ModuleList(Layer(sandwich, SlidingWindow()) for _ in range(2))
        self.cross = nn.ModuleList(Heads(5) for _ in range(2))

    def forward(self, source: Tensor, x: Tensor) -> Tensor:
        source = self.encoder(source)
        for layer, cross in zip(self.decoder, self.cross):
            x = layer(x + cross(x, source))
        return x


def test_encoder_and_decoder_with_cross_attention() -> None:
    split = under("encoder", LAYER) | under("decoder.*", LAYER, 0, 1) | under("cross.*", HEADS, 0, 1)
    model = EncoderDecoder()
    check(
        model, randn(2, 5, D), randn(2, 7, D), split=split, collectives={"all_reduce": 8}, moves={"enter": 9}, tps=(3,)
    )


# Relative positions ------------------------------------------------------------------------------------


class Relative(nn.Module):
    """T5: one table of biases per head, looked up once and added in both layers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.table = nn.Embedding(8, count)
        self.attention = nn.ModuleList(Heads(count) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        far = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None, :]
        bucket = torch.where(far > 0, 4, 0) + far.abs().clamp(max=3)
        bias = self.table(bucket).permute(2, 0, 1).unsqueeze(0)
        for attention in self.attention:
            x = x + attention(x, bias=bias)
        return x


def test_one_table_of_relative_biases_for_all_layers() -> None:
    split = {"table.weight": 1} | under("attention.*", HEADS, 0, 1)
    program, *_ = check(Relative(6), randn(2, 7, D), split=split, collectives={"all_reduce": 2}, tps=(4,))
    assert program.weight_layouts["table.weight"].shards[0][1].counts == (2, 2, 1, 1)


# Vocabulary and positions ------------------------------------------------------------------------------


class Words(nn.Module):
    """Words and positions, an MLP, and logits."""

    def __init__(self, positions: str, words: int = 601, hidden: int = D, cap: float | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(words, hidden), nn.Linear(hidden, words)
        self.positions, self.cap = positions, cap
        if positions == "learnt":
            self.places = nn.Embedding(16, hidden)
        elif positions == "sinusoidal":
            angle = torch.arange(16)[:, None] / 100.0 ** (torch.arange(hidden // 2) / hidden)
            self.register_buffer("places", torch.cat([angle.sin(), angle.cos()], -1))

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        if self.positions == "learnt":
            x = x + self.places(torch.arange(ids.shape[1]) + 2)
        elif self.positions == "sinusoidal":
            x = x * 8 + self.places[: ids.shape[1]]
        logits = self.head(x)
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())


VOCABULARY = {"embed.weight": 0, "head.weight": 0, "head.bias": 0}


@pytest.mark.parametrize("positions", ["learnt", "sinusoidal"])
def test_positions_are_added_once(positions: str) -> None:
    collectives = {"all_reduce": 1, "all_gather": 1}
    check(Words(positions), ids(601), split=VOCABULARY, collectives=collectives, moves={"enter": 1}, tps=(3,))


@pytest.mark.parametrize("loss", [False, True])
def test_soft_capped_logits(loss: bool) -> None:
    last = "vocab_parallel_cross_entropy" if loss else "all_gather"
    inputs = (ids(601), ids(601).roll(1, 1)) if loss else (ids(601),)
    check(Words("", cap=1.5), *inputs, split=VOCABULARY, collectives={"all_reduce": 1, last: 1}, tps=(3,))


def test_a_vocabulary_of_50257_words_on_4_ranks() -> None:
    model, tokens = Words("", words=50257, hidden=16), ids(50257)
    tokens[0, 0] = 50256
    collectives = {"all_reduce": 1, "vocab_parallel_cross_entropy": 1}
    program, *_ = check(model, tokens, tokens.roll(1, 1), split=VOCABULARY, collectives=collectives, tps=(4,))
    for name in VOCABULARY:
        assert program.weight_layouts[name].shards[0][1].counts == (12565, 12564, 12564, 12564)


def test_padding_of_a_tied_vocabulary_has_the_heads_gradient_only() -> None:
    tokens = ids(601)
    tokens[0, :3] = 3
    model = Language(601, tied=True, padding=3)
    split = {"embed.weight": 0} | under("mlp", FEED)
    check(model, tokens, split=split, collectives={"all_reduce": 2, "all_gather": 1}, tps=(3,))


def test_padding_of_an_untied_vocabulary_has_no_gradient() -> None:
    tokens = ids(601)
    tokens[0, :3] = 3
    model = Language(601, tied=False, padding=3)
    program, *_ = check(model, tokens, tps=(3,))
    assert "embed.weight" in program.weight_layouts
    gradient = run(simulation(model, program), model, [tokens]).gradients["embed.weight"]
    assert gradient is not None
    assert not gradient[3].any()
    assert gradient[tokens[1]].any(-1).all()


# Weights used in other ways ----------------------------------------------------------------------------


class Weights(nn.Module):
    """Products with the weights ``up`` and ``down``, or parts or views of them, as ``op`` says."""

    def __init__(self, op: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.op, self.weights = op, nn.ParameterList(nn.Parameter(torch.randn(s)) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x.cumsum(-1), *self.weights).cumsum(-1)


def sliced(x: Tensor, w: Tensor, down: Tensor) -> Tensor:
    """One fused weight sliced before its uses, as nn.MultiheadAttention's."""
    q, k, v = (F.linear(x, w[i : i + 48]).unflatten(-1, (6, 8)).transpose(1, 2) for i in (0, 48, 96))
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2) @ down


def joined(x: Tensor, a: Tensor, b: Tensor, down: Tensor) -> Tensor:
    """Weights put together before their one use."""
    gate, up = F.linear(x, torch.cat([a, b])).split(a.shape[0], -1)
    return (F.silu(gate) * up) @ down


WRITTEN: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "a transposed weight": (lambda x, u, d: (x @ u.T).tanh() @ d.T, ((95, D), (D, 95)), (0, 1)),
    "a view of a weight": (lambda x, u, d: F.linear(x, u.view(96, D)).tanh() @ d, ((12, 8, D), (96, D)), (0, 0)),
    "a flat weight": (lambda x, u, d: F.linear(x, u.view(96, D)).tanh() @ d, ((96 * D,), (96, D)), (0, 0)),
    "a weight used twice": (
        lambda x, u, d: (F.linear(x, u).tanh() * F.linear(x * x, u)) @ d, ((95, D), (95, D)), (0, 0)
    ),
    "a weight used both ways": (lambda x, u: F.linear(x, u).tanh() @ u, ((95, D),), (0,)),
    "a weight sliced before use": (sliced, ((144, D), (48, D)), (0, 0)),
    "weights joined before use": (joined, ((50, D), (50, D), (50, D)), (0, 0, 0)),
    "batched products with a weight per head": (
        lambda x, u, d: torch.matmul(torch.matmul(x[:, None], u).tanh(), d).sum(1), ((6, D, 8), (6, 8, D)), (0, 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_weights(name: str) -> None:
    op, shapes, dims = WRITTEN[name]
    split = {f"weights.{i}": d for i, d in enumerate(dims)}
    check(Weights(op, *shapes), randn(2, 5, D), split=split, collectives=ONE, moves={"enter": 1}, tps=(4,))


def test_weights_stacked_before_use() -> None:
    def stacked(x: Tensor, a: Tensor, b: Tensor, down: Tensor) -> Tensor:
        return torch.einsum("bsi,noi->nbso", x, torch.stack([a, b])).tanh().sum(0) @ down

    split = {f"weights.{i}": 0 for i in range(3)}
    check(Weights(stacked, (50, D), (50, D), (50, D)), randn(2, 5, D), split=split, collectives=ONE, tps=(4,))


# Values that are results too ---------------------------------------------------------------------------


class Returned(nn.Module):
    """Two MLPs on a residual; ``which`` says what is returned beside the result."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which, self.norm, self.a, self.b = which, nn.LayerNorm(D), Feed(), Feed()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = self.a(x)
        hidden = x + first
        normed = self.norm(hidden)
        inner = F.gelu(self.b.up(normed))
        second = self.b.down(inner)
        beside = {"hidden": (hidden, hidden * 2), "normed": (normed,), "all": (x, first, hidden, normed, inner, second)}
        return hidden + second, *beside[self.which]


RETURNED = {"hidden": {"all_reduce": 2}, "normed": {"all_reduce": 2}, "all": {"all_reduce": 2, "all_gather": 1}}


@pytest.mark.parametrize("which", RETURNED)
def test_gradients_of_results_that_are_read_by_shards_too_are_counted_once(which: str) -> None:
    split = under("*", FEED, "a", "b")
    check(Returned(which), randn(2, 5, D), split=split, collectives=RETURNED[which], tps=(3,))


class SideBySide(nn.Module):
    """Two norms of one value, which enters before them, feed two MLPs; one of them is a result too, or makes one."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which, self.p, self.q, self.a, self.b = which, nn.LayerNorm(D), nn.RMSNorm(D), Feed(), Feed()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        p, q = self.p(x), self.q(x)
        beside = {"one": (p,), "made of one": (p.exp(),), "made of both": (p @ q.mT,)}[self.which]
        return x + self.a(p) + self.b(q), *beside


@pytest.mark.parametrize("which", ["one", "made of one", "made of both"])
def test_gradients_of_results_between_where_values_enter_and_shards_are_counted_once(which: str) -> None:
    split = under("*", FEED, "a", "b")
    check(SideBySide(which), randn(2, 5, D), split=split, collectives=ONE, moves={"enter": 1}, tps=(3,))


class Factored(nn.Module):
    """A table narrower than the model, normalised and projected, as ALBERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.wide = nn.Embedding(3001, 48), nn.LayerNorm(48), nn.Linear(48, D)
        self.up, self.down = nn.Linear(D, 80), nn.Linear(80, D)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wide(self.norm(self.table(ids)))
        return x + self.down(self.up(x).tanh())


def test_a_table_is_split_over_its_rows_though_its_columns_could_be() -> None:
    """Columns would save as much memory, and some of the projection's, for a wider reduction and a norm's exchange."""
    program, *_ = check(Factored(), torch.randint(0, 3001, (2, 5)), tps=(3,))
    assert program.weight_layouts["table.weight"].shards[0][0] == 0


# Torch's own attention and flex_attention ------------------------------------------------------------


class Own(nn.Module):
    """nn.MultiheadAttention, whose queries, keys and values are parts of one weight."""

    def __init__(self, weights: bool, same_batch: bool = False) -> None:
        super().__init__()
        self.weights, self.same_batch = weights, same_batch
        self.m = nn.MultiheadAttention(D, 8, batch_first=True)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        source = x if source is None else source
        if self.same_batch:
            assert x.shape[0] == source.shape[0]
        return self.m(x, source, source, need_weights=self.weights)[: 1 + self.weights]


OWN = {"m.in_proj_weight": 0, "m.in_proj_bias": 0, "m.out_proj.weight": 1}


def test_attention_weights_averaged_over_heads_are_a_sum_too() -> None:
    program, *_ = check(Own(weights=True), randn(2, 5, D), split=OWN, collectives={"all_reduce": 2}, tps=(3,))
    assert program.weight_layouts["m.in_proj_weight"].shards[0][1].counts == (72, 72, 48)


def test_cross_attention_of_torch() -> None:
    inputs = randn(2, 5, D), randn(2, 7, D)
    check(Own(False, same_batch=True), *inputs, split=OWN, collectives=ONE, moves={"enter": 2}, tps=(3,))


def test_cross_attention_of_torch_is_right_where_nothing_says_that_batches_are_equal() -> None:
    check(Own(True), randn(2, 5, D), randn(2, 7, D), tps=(3,))


class Seq2Seq(nn.Module):
    """nn.Transformer, which looks at the values of a mask to find out whether it is a causal one."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Transformer(D, 8, 1, 1, 80, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return self.t(source, target, tgt_mask=mask)


@pytest.mark.parametrize("causal", [True, False])
def test_nn_transformer(causal: bool) -> None:
    """Cross-attention too, and whatever the mask is: two reductions a layer, three where it attends twice."""
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    inputs = randn(2, 5, D), randn(2, 7, D), mask if causal else mask.T.contiguous()
    check(Seq2Seq(), *inputs, collectives={"all_reduce": 5}, moves={"enter": 7}, tps=(3,))


class Flex(Heads):
    """flex_attention by a mask that is made once; scores and mask may differ from head to head."""

    def __init__(self, how: str, length: int = 5) -> None:
        super().__init__()
        self.how = how
        if how == "grouped queries":
            self.k, self.v = nn.Linear(D, 2 * self.size), nn.Linear(D, 2 * self.size)
        heads = self.count if how == "a mask a head" else None

        def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return i + h >= j if how == "a mask a head" else i >= j

        self.mask = create_block_mask(allowed, None, heads, length, length, device="cpu")

    def scored(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + (j - i) * (h + 1 if self.how == "a slope a head" else 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scored = self.scored if self.how in ("positions", "a slope a head") else None
        y = flex_attention(q, k, v, scored, self.mask, enable_gqa=self.how == "grouped queries")
        return self.o(y.transpose(1, 2).flatten(2))


FLEX = {f"{m}.{n}": 0 for m in "qkv" for n in ("weight", "bias")} | {"o.weight": 1}
TELLS_HEADS_APART = ("a mask a head", "a slope a head")


@pytest.mark.parametrize("how", ["causal", "positions", "grouped queries", *TELLS_HEADS_APART])
def test_flex_attention(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split by heads; whole where its Python functions are given a head's number to tell heads apart by."""
    flex = importlib.import_module("torch._higher_order_ops.flex_attention")
    one, trace = threading.Lock(), flex.create_fw_bw_graph

    def one_by_one(*args: object) -> object:
        with one:
            return trace(*args)

    # torch traces the gradient at each call, which no two threads (here, ranks) may do at a time
    monkeypatch.setattr(flex, "create_fw_bw_graph", one_by_one)
    # on a CPU it can compute it, but refuses to, because its fused kernel cannot
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    apart = how in TELLS_HEADS_APART
    split, collectives = (None, None) if apart else (FLEX, ONE)
    program, *_ = check(Flex(how), randn(2, 5, D), split=split, collectives=collectives, tps=(3,))
    assert [op for _, op in program.gathered].count("flex_attention_outputs") == 3 * apart


def test_flex_attention_with_gradients_on_a_cpu_is_refused_in_torchs_words() -> None:
    with pytest.raises(CaptureError, match="FlexAttention does not support backward on CPU"):
        captured_of(Flex("causal"), randn(2, 5, D).float())
