"""Experts, convolutions and other ops beside attention: what they leave alone is split, what they mix is whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import ops
from passes.ops.context import use_context
from passes.ops.single_results import OUTPUTS
from tests.passes.harness import captured_of, check, randn, scrambled

WIDTH, FFN, EXPERTS = 32, 37, 4


class Experts(nn.Module):
    """Each row's two best experts, their matrices picked by a vector of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.empty(EXPERTS, 2 * FFN, WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, FFN))

    def run(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        gate, up = torch.bmm(self.up[chosen], x.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        return torch.bmm(self.down[chosen], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        scores, chosen = self.router(rows).softmax(-1).topk(2)
        copies = rows.unsqueeze(1).expand(-1, 2, -1).flatten(0, 1)
        y = self.run(copies, chosen.reshape(-1)) * scores.reshape(-1, 1)
        return x + y.view(-1, 2, WIDTH).sum(1).view(x.shape)


class SortedExperts(Experts):
    """Rows sorted by expert, and one product for each run of rows."""

    def run(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        order = chosen.argsort()
        ends = F.one_hot(chosen, EXPERTS).sum(0).cumsum(0).to(torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        gate, up = product(x[order], self.up.transpose(1, 2), ends).chunk(2, dim=-1)
        return product(F.silu(gate) * up, self.down.transpose(1, 2), ends)[order.argsort()]


def test_experts_are_split_by_neurons_with_one_reduction() -> None:
    check(Experts(), randn(2, 3, WIDTH), split={"up": 1, "down": 2}, collectives={"all_reduce": 1}, moves={"enter": 1})


def test_experts_of_sorted_rows() -> None:
    import transformers.integrations.moe  # noqa: F401  # the op

    check(SortedExperts(), randn(2, 3, WIDTH), split={"up": 1, "down": 2}, collectives={"all_reduce": 1})


class SharedExpert(Experts):
    """An expert for all rows beside the routed ones: both read one value, of which the router wants all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.tanh()
        return super().forward(x) + self.second(F.gelu(self.first(x)))


def test_what_a_router_and_two_kinds_of_experts_read_enters_once() -> None:
    (program,) = check(SharedExpert(), randn(2, 3, WIDTH), moves={"enter": 1}, tps=(3,))
    (enter,) = (n for n in program.graph.nodes if getattr(n.target, "__name__", "") == "enter")
    assert not isinstance(enter.args[0], tuple), "one value, not its view beside it"


class Latent(nn.Module):
    """Two small values made of one, each read by all heads (multi-head latent attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_down, self.kv_down = nn.Linear(64, 3, bias=False), nn.Linear(64, 2, bias=False)
        self.q_norm, self.kv_norm = nn.RMSNorm(3), nn.RMSNorm(2)
        self.q_up, self.kv_up = nn.Linear(3, 24, bias=False), nn.Linear(2, 24 + 24, bias=False)
        self.out = nn.Linear(24, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (*x.shape[:2], 6, -1)
        q = self.q_up(self.q_norm(self.q_down(x))).view(heads).transpose(1, 2)
        k, v = self.kv_up(self.kv_norm(self.kv_down(x))).view(heads).transpose(1, 2).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], 24))


def test_two_small_values_enter_side_by_side() -> None:
    split = {"q_up.weight": 0, "kv_up.weight": 0, "out.weight": 1}
    (program,) = check(
        Latent(), randn(2, 5, 64), split=split, collectives={"all_reduce": 1}, moves={"enter": 1}, tps=(4,)
    )
    (enter,) = (n for n in program.graph.nodes if getattr(n.target, "__name__", "") == "enter")
    assert len(enter.args[0]) == 2
    assert sum(n.meta["global"].shape[-1] for n in enter.args[0]) == 5, "not the value of 64 that they are made of"


class Returned(nn.Module):
    """Two values made of one that computation on shards reads, and the caller one of them too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.down = nn.Linear(WIDTH, FFN), nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one, other = x.tanh(), x.sigmoid()
        return self.down(F.gelu(self.first(one)) * self.second(other)), other


def test_the_gradient_of_a_value_that_is_also_returned_counts_once() -> None:
    check(Returned(), randn(2, 3, WIDTH), collectives={"all_reduce": 1}, moves={"enter": 1})


class Convolved(nn.Module):
    """Gated depthwise convolution between two projections (Mamba's and LFM-2's short convolutions)."""

    def __init__(self, dims: int = 1) -> None:
        super().__init__()
        self.dims = dims
        self.up, self.down = nn.Linear(WIDTH, 2 * FFN, bias=False), nn.Linear(FFN, WIDTH)
        kernel = (FFN, 1, *[3] * dims)
        self.weight, self.bias = nn.Parameter(torch.empty(kernel)), nn.Parameter(torch.empty(FFN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, gate = self.up(x).movedim(-1, 1).chunk(2, dim=1)
        convolve = F.conv1d if self.dims == 1 else F.conv2d
        y = convolve(y, self.weight, self.bias, padding=2, groups=FFN)
        y = y[(..., *[slice(0, n) for n in x.shape[1:-1]])]
        return self.down((y * F.silu(gate)).movedim(1, -1))


@pytest.mark.parametrize("dims", [1, 2])
def test_depthwise_convolutions_are_split_by_channels(dims: int) -> None:
    split = {"up.weight": 0, "down.weight": 1, "weight": 0, "bias": 0}
    x = randn(2, *[5, 4][:dims], WIDTH)
    check(Convolved(dims), x, split=split, collectives={"all_reduce": 1}, moves={"enter": 1})


class ConvolvedTwice(nn.Module):
    """Convolutions over all channels: the first makes channels, the second sums over them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(WIDTH, FFN, 3, padding=1), nn.Conv1d(FFN, WIDTH, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.gelu(self.first(x)))


def test_convolutions_are_column_and_row_parallel() -> None:
    split = {"first.weight": 0, "first.bias": 0, "second.weight": 1}
    check(ConvolvedTwice(), randn(2, WIDTH, 9), split=split, collectives={"all_reduce": 1}, moves={"enter": 1})


class Grouped(nn.Module):
    """Groups of several channels, which have no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv, self.down = nn.Linear(WIDTH, 6), nn.Conv1d(6, 6, 3, groups=2), nn.Linear(6, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.conv(self.up(x).transpose(1, 2)).transpose(1, 2))


def test_other_groups_are_right_all_the_same() -> None:
    check(Grouped(), randn(2, 5, WIDTH))


class Heads(nn.Module):
    """Something done to 6 heads of 8 features between two projections."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.up, self.down = kind, nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "complex":
            angle = torch.arange(x.shape[1], dtype=x.dtype)
            turn = torch.polar(torch.ones_like(angle), angle)[:, None, None]
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn)
        if self.kind == "maxima":
            top, where = x.max(dim=1, keepdim=True)
            return x - top + where * x.min(1, True)[0]
        if self.kind == "pad":
            return F.pad(x, (0, 0, 0, 0, 2, 1))[:, : x.shape[1]].roll(1, 1)
        if self.kind == "rows":
            return x[:, torch.arange(x.shape[1]).flip(0).clamp(max=3)] * torch.multiply(x, 2)
        if self.kind == "vmap":
            places = torch.arange(x.shape[1])
            before = torch.vmap(torch.vmap(lambda q, k: k <= q, (None, 0)), (0, None))(places, places)
            return torch.einsum("qk,bkhd->bqhd", before.to(x.dtype), x)
        assert self.kind == "stack"
        states, state = [], torch.zeros_like(x[:, 0])
        for i in range(4):
            state = state * 0.5 + x[:, i]
            states.append(state)
        return torch.stack(states, dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.between(self.up(x).view(*x.shape[:2], 6, 8))
        return self.down(y.reshape(*y.shape[:2], 48))


@pytest.mark.parametrize("kind", ["complex", "maxima", "pad", "rows", "stack", "vmap"])
def test_what_is_done_to_each_head_leaves_heads_apart(kind: str) -> None:
    x = randn(2, 4, WIDTH)
    check(Heads(kind), x, split={"up.weight": 0, "up.bias": 0, "down.weight": 1}, collectives={"all_reduce": 1})


def test_each_result_of_an_op_with_several_is_a_node() -> None:
    graph = captured_of(scrambled(Heads("maxima")), randn(2, 4, WIDTH)).graph
    targets = [n.target for n in graph.nodes]
    assert not set(targets) & set(OUTPUTS)
    assert [t.__name__ for t in targets if t in {f for each in OUTPUTS.values() for f in each}] == [
        "max_values",
        "max_indices",
        "min_values",
    ]


class PerHeadSteps(nn.Module):
    """A small weight from all of the heads' values to a number for each head (Doge's dynamic mask)."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.steps, self.out = nn.Linear(48, 48), nn.Linear(48, 6), nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.v(x)
        return self.out((v.view(*x.shape[:2], 6, 8) * self.steps(v).unsqueeze(-1)).reshape(x.shape))


def test_a_small_weight_between_split_dims_stays_whole() -> None:
    (program,) = check(PerHeadSteps(), randn(2, 5, 48), tps=(3,))
    assert set(program.weight_layouts) >= {"v.weight", "out.weight"}
    assert "steps.weight" not in program.weight_layouts
    assert "two dims of it" in program.reasons["steps.weight"].text


class JoinedTables(nn.Module):
    """Features of two tables side by side, which a projection mixes with what stays one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.shapes = nn.Embedding(301, 64), nn.Embedding(301, 80)
        self.mix = nn.Linear(144, 64)
        self.head = nn.Linear(64, 301, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(torch.cat([self.words(ids), self.shapes(ids)], -1)).softmax(-1))


def test_a_piece_that_cannot_be_split_keeps_no_vocabulary_from_it() -> None:
    (program,) = check(JoinedTables(), torch.arange(10).view(2, 5), tps=(3,))
    assert program.weight_layouts["words.weight"].shards[0][0] == 0


class _Alone:
    """A world of one rank, and its only communicator."""

    rank, size = 0, 1

    def group(self, name: str) -> _Alone:
        return self

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()


def test_what_no_gradient_reaches_has_none_also_where_it_enters_with_others() -> None:
    read, unread, other = (torch.ones(3, requires_grad=True) for _ in range(3))
    with use_context(_Alone()):  # type: ignore[arg-type]
        first, _, third = ops.enter((read, unread, other), "tp")
        (first * 2 + third * 3).sum().backward()
    assert read.grad.tolist() == [2.0] * 3
    assert other.grad.tolist() == [3.0] * 3
    assert unread.grad is None, "zeros would decay it"
