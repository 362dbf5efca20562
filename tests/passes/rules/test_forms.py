"""Ways in which attention is written, each split by heads with one reduction and no gather."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autotp.program.sharded_program import shard_graph
from passes import minimum, ops
from passes.planning.assign import assign
from passes.planning.propagate import propagate
from tests.passes.harness import called, captured_of, check, randn, scrambled

HIDDEN, HEADS, SIZE = 32, 8, 4


class Form(nn.Module):
    """Attention over heads; subclasses say how queries, keys and values are made."""

    kv = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, HEADS * SIZE)
        self.k = nn.Linear(HIDDEN, self.kv * SIZE)
        self.v = nn.Linear(HIDDEN, self.kv * SIZE)
        self.o = nn.Linear(HEADS * SIZE, HIDDEN)

    def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.view(*x.shape[:2], heads, SIZE).transpose(1, 2)

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x), n) for p, n in ((self.q, HEADS), (self.k, self.kv), (self.v, self.kv)))
        q, k = self.changed(q), self.changed(k)
        k, v = (t.repeat_interleave(HEADS // self.kv, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))


ALL = {f"{m}.{p}": d for m, d in (("q", 0), ("k", 0), ("v", 0)) for p in ("weight", "bias")} | {"o.weight": 1}


class InterleavedRotary(Form):
    """The angles of neighbouring features, copied in pairs, as GPT-J and Cohere write them."""

    kv = 2

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
        angle = torch.repeat_interleave(angle, 2, dim=-1)
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * angle.cos() + turned * angle.sin()


def test_interleaved_rotary() -> None:
    check(InterleavedRotary(), randn(2, 5, HIDDEN), split=ALL)


class Written(Form):
    """Queries and keys written part by part into new memory, as DeepSeek's attention does."""

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        new = x.new_empty(x.shape[0], HEADS, x.shape[2], SIZE)
        new[..., :1] = x[..., :1] * 2
        new[..., 1:] = x[..., 1:].tanh()
        return new


def test_parts_written_into_new_memory() -> None:
    check(Written(), randn(2, 5, HIDDEN), split=ALL)


class NormedOverAll(Form):
    """A norm over all heads of the keys at once (OLMo-2), fewer of them than ranks."""

    kv = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(self.kv * SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = self.k(x)
        k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        q, k, v = self.split(self.q(x), HEADS), self.split(k, self.kv), self.split(self.v(x), self.kv)
        k, v = (t[:, :, None].expand(-1, -1, HEADS // self.kv, -1, -1).flatten(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def test_a_norm_over_replicated_heads_costs_one_small_reduction() -> None:
    programs = check(
        NormedOverAll(), randn(2, 5, HIDDEN), split=ALL | {"weight": 0}, collectives={"all_reduce": 2}, tps=(2, 3, 4, 8)
    )
    for program in programs:
        assert len(program.minimum.forward) == 2


class FusedNorms(Form):
    """Queries, and fewer keys than ranks, each normed over all heads at once by one op."""

    kv = 2

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.q_norm, self.k_norm = kind(HEADS * SIZE), kind(self.kv * SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.split(self.q_norm(self.q(x)), HEADS), self.split(self.k_norm(self.k(x)), self.kv)
        k, v = (t.repeat_interleave(HEADS // self.kv, 1) for t in (k, self.split(self.v(x), self.kv)))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_fused_norms_over_all_heads_stay_sharded(kind: type[nn.Module]) -> None:
    model = FusedNorms(kind)
    norms = {n: 0 for n, _ in model.named_parameters() if "norm" in n}
    programs = check(model, randn(2, 5, HIDDEN), split=ALL | norms, collectives={"all_reduce": 1}, tps=(2, 3, 4, 8))
    for program in programs:
        assert called(program.graph, ["norm_over_shards"]) == {"norm_over_shards": 2}
        assert len(program.minimum.forward) == 3


class FusedMultiQuery(nn.Module):
    """One key and value for all queries, behind them in one weight, and picked out by a list (Falcon)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2) * SIZE)
        self.o = nn.Linear(HEADS * SIZE, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], HEADS + 2, SIZE)
        q, k, v = (t.transpose(1, 2) for t in (qkv[:, :, :-2], qkv[:, :, [-2]], qkv[:, :, [-1]]))
        k = k * torch.arange(1, x.shape[1] + 1).to(x.dtype)[:, None]
        y = F.scaled_dot_product_attention(q, k.expand(q.shape), v.expand(q.shape), is_causal=True)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def test_one_key_fused_behind_the_queries_stays_on_its_rank() -> None:
    split = {"qkv.weight": 0, "qkv.bias": 0, "o.weight": 1}
    check(FusedMultiQuery(), randn(2, 5, HIDDEN), split=split, tps=(2, 3, 4, 8))


class KeyReturned(FusedMultiQuery):
    """The one key is a result too: it leaves its ranks whole, with a whole gradient."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = self.qkv(x).view(*x.shape[:2], HEADS + 2, SIZE)[:, :, -2]
        return super().forward(x), key


def test_a_key_that_every_rank_holds_can_be_a_result() -> None:
    check(KeyReturned(), randn(2, 5, HIDDEN), split={"qkv.weight": 0, "qkv.bias": 0, "o.weight": 1})


class Shifted(Form):
    """Relative positions by a view that mixes two sequence dims (XLNet)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x), HEADS) for p in (self.q, self.k, self.v))
        scores = torch.cat([q @ k.mT, k @ q.mT], dim=-1)
        b, h, i, j = scores.shape
        scores = scores.reshape(b, h, j, i)[:, :, 1:, :].reshape(b, h, i, j - 1)
        scores = torch.index_select(scores, 3, torch.arange(i))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], -1))


def test_a_view_that_mixes_sequences_keeps_heads_apart() -> None:
    check(Shifted(), randn(2, 5, HIDDEN), split=ALL)


class FixedSizes(Form):
    """Batch and sequence that the model fixes are no weights' dims: the plan is that of free sizes."""

    kv = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] == 4
        assert x.shape[1] == 8
        return super().forward(x)


def test_fixed_batch_and_sequence_are_not_split() -> None:
    check(FixedSizes(), randn(4, 8, HIDDEN), split=ALL)


def test_the_minimum_counts_what_a_plan_needs_and_no_more() -> None:
    model = scrambled(NormedOverAll())
    captured = captured_of(model, randn(2, 5, HIDDEN))
    facts = propagate(captured.graph)
    nothing = minimum(captured.graph, facts, assign(captured.graph, facts, {}, 4), {})
    assert nothing.forward == nothing.backward == ()


class Mixed(Form):
    """A residual stream weighed by a few learnt numbers, each read by itself; a part of no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.7, 1.3]))
        self.table = nn.Parameter(torch.randn(4, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.weights[0] * x + self.weights[1] * super().forward(x) + self.table[1] * self.table[3]
        nothing = torch.fill(h[:, 3:3], 2.0)
        return torch.slice_scatter(h, nothing, 1, 3, 3)


def test_weights_of_which_single_entries_are_read_are_not_split() -> None:
    check(Mixed(), randn(2, 5, HIDDEN), split=ALL, collectives={"all_reduce": 1})


class CastLike(nn.Module):
    """An MLP whose activation is computed in float32, and cast to the dtype of another value."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return self.down(nn.functional.silu(h.float()).type_as(h))


def test_the_dtype_of_a_split_value_is_read_without_a_gather() -> None:
    """In narrow dtypes: in float64 there is nothing to cast."""
    program = shard_graph(captured_of(CastLike().bfloat16(), randn(2, 5, HIDDEN).bfloat16()), 2)
    targets = [n.target for n in program.graph.nodes]
    assert ops.all_gather not in targets
    assert targets.count(ops.all_reduce) == 1
    assert program.verdict.proved
