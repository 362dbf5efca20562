"""Every op rule against real arithmetic.

Most ops are tested *between* two products, ``down(op(up(x)))``: if the rule follows its labels, ``up`` is
split by rows, ``down`` by columns, and one ``all_reduce`` is all the communication there is. A rule that
falls back to whole values fails by its collectives even though its numbers are right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.program.sharded_program import shard_graph
from tests.passes.harness import called, captured_of, check, randn, run, scrambled, simulation

B, S, D = 2, 3, 64
"""Batch, sequence, and the width of what is never split here."""
ONE = {"all_reduce": 1}


class Between(nn.Module):
    """``down(op(up(x)))``; further parameters and buffers are given to ``op`` after the activation.

    The cumulative sums keep the features of input and output together, so that only what lies between
    the two products is there to be split.
    """

    def __init__(self, op: Callable[..., Tensor], width: int, bias: bool = True, **tensors: Tensor) -> None:
        super().__init__()
        self.op, self.up = op, nn.Linear(D, width, bias=bias)
        self.names = list(tensors)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        with torch.no_grad():
            out = op(torch.randn(B, S, width), *[getattr(self, n) for n in self.names]).shape[-1]
        self.down = nn.Linear(out, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        tensors = [getattr(self, n) for n in self.names]
        return self.down(self.op(self.up(x.cumsum(-1)), *tensors)).cumsum(-1)


PAIR = {"up.weight": 0, "up.bias": 0, "down.weight": 1}


def heads(y: Tensor, count: int = 12) -> Tensor:
    return y.unflatten(-1, (count, -1))


def parted(y: Tensor, sizes: list[int]) -> Tensor:
    a, b, c = y.split(sizes, -1)
    return a * b + c


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "reshape": lambda y: y.reshape(B, S, 12, 5).tanh().reshape(B, S, 60),
    "view with -1": lambda y: y.view(*y.shape[:-1], 12, -1).tanh().view(*y.shape[:-1], -1),
    "unflatten and flatten": lambda y: heads(y).flatten(-2),
    "flatten batch": lambda y: y.flatten(0, 1).tanh().unflatten(0, y.shape[:2]),
    "batch into heads": lambda y: (
        heads(y).transpose(1, 2).flatten(0, 1).tanh().unflatten(0, (y.shape[0], 12)).transpose(1, 2).flatten(-2)
    ),
    "unsqueeze and squeeze": lambda y: y.unsqueeze(1).tanh().squeeze(1),
    "squeeze of nothing": lambda y: heads(y, 4).squeeze(-2).flatten(-2).squeeze(),
    "permute": lambda y: heads(y).permute(2, 0, 3, 1).tanh().permute(1, 3, 0, 2).flatten(-2),
    "transpose": lambda y: y.transpose(0, 2).tanh().transpose(0, 2),
    "movedim": lambda y: heads(y).movedim(-2, 0).movedim(0, -2).flatten(-2),
    "expand": lambda y: y.unsqueeze(2).expand(-1, -1, 7, -1).tanh().sum(2).repeat_interleave(2, -1),
    "repeat": lambda y: y.unsqueeze(2).repeat(1, 1, 7, 1).tanh().sum(2).repeat(1, 1, 2),
    "repeat_interleave": lambda y: heads(y).repeat_interleave(3, 2).flatten(-2),
    "expand as groups": lambda y: heads(y).unsqueeze(3).expand(-1, -1, -1, 3, -1).reshape(B, S, -1),
    "first half": lambda y: y[..., :30],
    "both halves swapped": lambda y: torch.cat([y[..., 30:], y[..., :30]], -1),
    "negative slice": lambda y: y[..., -48:-4],
    "every second": lambda y: y[..., ::2] * y[..., 1::2],
    "narrow": lambda y: y.narrow(-1, 4, 50),
    "flip": lambda y: y.flip(-1),
    "flip of heads": lambda y: heads(y).flip(-2).flatten(-2),
    "select inside heads": lambda y: heads(y)[..., 1] + heads(y)[..., -1],
    "select outside heads": lambda y: heads(y, 3)[..., 1, :] * heads(y, 3)[..., 2, :],
    "first of the sequence": lambda y: y[:, 0].unsqueeze(1) + y[:, 1:],
    "chunk": lambda y: torch.mul(*y.chunk(2, -1)),
    "uneven chunk": lambda y: heads(y, 5).chunk(2, -1)[0].flatten(-2),
    "split": lambda y: y.split(15, -1)[3] + y.split(15, -1)[0],
    "split with sizes": lambda y: parted(y, [20, 20, 20]),
    "unbind": lambda y: torch.mul(*heads(y, 2).unbind(-2)),
    "windows": lambda y: y.unfold(1, 2, 1).amax(-1),
    "windows inside heads": lambda y: heads(y).unfold(-1, 3, 2).flatten(2),
    "one window outside heads": lambda y: heads(y, 5).unfold(2, 5, 1).flatten(2),
    "cat": lambda y: torch.cat([y, y.tanh(), y * 2], -1),
    "cat over the sequence": lambda y: torch.cat([y, y[:, :1]], 1),
    "cat inside heads": lambda y: torch.cat([-heads(y, 6)[..., 5:], heads(y, 6)[..., :5]], -1).flatten(-2),
    "stack": lambda y: torch.stack([y, y.tanh()], -1).flatten(-2),
    "stack outside": lambda y: torch.stack([y, y.tanh()], 2).flatten(-2),
    "stack and unbind": lambda y: torch.mul(*torch.stack([y, y.tanh()]).unbind(0)),
}


@cache
def between(op: Callable[[Tensor], Tensor]) -> Between:
    """The one model for an op, which other tests use too."""
    return Between(op, 60)


@pytest.mark.parametrize("name", VIEWS)
def test_movement(name: str) -> None:
    check(between(VIEWS[name]), randn(B, S, D), split=PAIR, collectives=ONE, moves={"enter": 1})


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda y: (2 * y - y / 3 + 1) ** 2 - y.neg(),
    "activations": lambda y: F.gelu(y) + F.silu(y) + F.relu(y) + y.sigmoid() + F.softplus(y) + F.leaky_relu(y),
    "glu by hand": lambda y: F.silu(y) * y,
    "where": lambda y: torch.where(y > 0, y, torch.zeros_like(y)),
    "masked_fill": lambda y: y.masked_fill(y < 0, 0.5),
    "clamp": lambda y: y.clamp(-1, 1) + torch.maximum(y, -y),
    "casts": lambda y: y.to(torch.float64) + y.detach().to(torch.float32).to(y.dtype).type_as(y),
    "rounding": lambda y: y * y.detach().floor() + y.sign(),
    "full_like": lambda y: y + torch.ones_like(y) + torch.full_like(y, 3),
    "broadcast over heads": lambda y: (heads(y) * heads(y).mean(-1, keepdim=True)).flatten(-2),
    "broadcast over the sequence": lambda y: y - y.mean(1, keepdim=True),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name: str) -> None:
    check(between(POINTWISE[name]), randn(B, S, D), split=PAIR, collectives=ONE, moves={"enter": 1})


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: heads(y).sum(-1),
    "mean kept": lambda y: (heads(y) - heads(y).mean(-1, keepdim=True)).flatten(-2),
    "amax": lambda y: heads(y).amax(-1) + heads(y).amin(-1),
    "softmax in heads": lambda y: heads(y).softmax(-1).flatten(-2),
    "softmax over the sequence": lambda y: y.softmax(1) + F.log_softmax(y, 1),
    "cumsum": lambda y: y.cumsum(1),
    "logsumexp": lambda y: heads(y).logsumexp(-1),
    "variance": lambda y: heads(y).var(-1) + heads(y).std(-1),
    "norm": lambda y: (heads(y) / heads(y).norm(dim=-1, keepdim=True)).flatten(-2),
    "vector norm": lambda y: torch.linalg.vector_norm(heads(y), dim=-1),
    "sum over the sequence": lambda y: y.sum(1, keepdim=True) + y,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_inside_a_unit(name: str) -> None:
    check(between(REDUCTIONS[name]), randn(B, S, D), split=PAIR, collectives=ONE, moves={"enter": 1})


SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(-1),
    "sum kept": lambda y: y.sum(-1, keepdim=True),
    "mean": lambda y: y.mean(-1),
    "mean over heads and features": lambda y: heads(y).mean((-1, -2)),
    "mean over the sequence too": lambda y: y.mean((1, 2)),
    "mean over all": lambda y: y.mean(),
    "sum over all": lambda y: y.sum(),
    "sum of squares": lambda y: (y * y).sum(-1) / 60,
    "mean with sequence flattened in": lambda y: y.flatten(1).mean(-1),
    "of another dtype": lambda y: y.float().sum(-1, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_over_units_stay_pending(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(D, 60)

        def forward(self, x: Tensor) -> Tensor:
            return SUMS[name](self.up(x).tanh())

    sums_heads_only = name == "sum over heads"
    check(Model(), randn(B, S, D), split={"up.weight": 0, "up.bias": 0}, collectives=ONE,
          tps=(2, 3, 4) if not sums_heads_only else (2, 3))  # fmt: skip


def test_what_mixes_the_split_dim_keeps_it_whole() -> None:
    for op in (
        lambda y: y.softmax(-1),
        lambda y: y.amax(-1, keepdim=True) + y,
        lambda y: y.cumsum(-1),
        lambda y: F.layer_norm(y.unflatten(-1, (6, 10)), (6, 10)).flatten(-2),
    ):
        check(Between(op, 60), randn(B, S, D), split={}, collectives={}, moves={}, tps=(2,))


OPAQUE: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda y: y.roll(1, -1),
    "sort": lambda y: y.sort(-1)[0],
    "topk": lambda y: y.topk(40, -1)[0],
    "flip of two dims": lambda y: heads(y).flip(-1, -2).flatten(-2),
    "views across factors": lambda y: (
        heads(y).transpose(-1, -2).reshape(*y.shape[:-1], 15, 4).transpose(-1, -2).flatten(-2)
    ),
    "slice of batch and features": lambda y: y.flatten(1)[:, 60:].unflatten(-1, (-1, 60)),
    "repeat of a long dim": lambda y: y.repeat(1, 1, 2),
    "tril": lambda y: y.tril(),
    "window of a scalar": lambda y: y * y.sum().unfold(0, 1, 1),
    "pixel shuffle": lambda y: F.pixel_shuffle(heads(y), 2).sum((-1, -2)) if y.shape[-1] == -1 else y.tril(1),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_an_op_without_a_rule_is_right_all_the_same(name: str) -> None:
    check(between(OPAQUE[name]), randn(B, S, D), tps=(2, 3))


# Products ------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two products with ``tanh`` between, each spelled by ``product(x, weight, bias)``."""

    def __init__(self, product: Callable[..., Tensor], *shapes: tuple[int, ...], bias: bool = True) -> None:
        super().__init__()
        self.product = product
        self.up, self.down = (nn.Parameter(torch.randn(s)) for s in shapes)
        self.a, self.b = (nn.Parameter(torch.randn(s[-1])) for s in shapes) if bias else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.cumsum(-1), self.up, self.a).tanh()
        return self.product(y, self.down, self.b).cumsum(-1)


def addmm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b, x.flatten(0, 1), w, alpha=0.7, beta=0.3).unflatten(0, x.shape[:2])


def baddbmm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(b, x, w.unsqueeze(0).expand(x.shape[0], -1, -1), alpha=0.7, beta=0.3)


PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, w, b: F.linear(x, w.t(), b),
    "matmul": lambda x, w, b: x @ w + b,
    "mm": lambda x, w, b: (torch.mm(x.flatten(0, 1), w) + b).unflatten(0, x.shape[:2]),
    "bmm": lambda x, w, b: torch.bmm(x, w.unsqueeze(0).expand(x.shape[0], -1, -1)) + b,
    "addmm": addmm,
    "baddbmm": baddbmm,
    "einsum": lambda x, w, b: torch.einsum("bsi,io->bso", x, w) + b,
    "einsum with dots": lambda x, w, b: torch.einsum("...i,io", x, w) + b,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    model = Pair(PRODUCTS[name], (D, 95), (95, D))
    check(model, randn(B, S, D), split={"up": 1, "a": 0, "down": 0}, collectives=ONE, moves={"enter": 1})


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    pair = {n: d for n, d in PAIR.items() if bias or "bias" not in n}
    check(Between(torch.tanh, 95, bias=bias), randn(B, S, D), split=pair, collectives=ONE, moves={"enter": 1})


def test_a_part_as_long_as_another_input() -> None:
    """Bounds that are known at run time only mix the dim that they cut, and no other."""

    class Model(Between):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            wide = self.up(x.cumsum(-1)).unflatten(-1, (12, -1))
            return self.down(wide[..., : y.shape[1]].sum(-1).tanh()).cumsum(-1)

    model = Model(lambda y: y[..., :12], 96)
    check(model, randn(B, S, D), randn(B, 5, D), split=PAIR, collectives=ONE, moves={"enter": 1})


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_triangular_systems(left: bool, shared: bool) -> None:
    """A system a head is split by heads; of one system for all, the right-hand sides' columns."""

    def solved(y: Tensor) -> Tensor:
        heads = y.unflatten(-1, (6, -1)).transpose(1, 2)
        products = torch.full((S, S), 0.1, dtype=y.dtype).tril(-1) if shared else (heads @ heads.mT).tanh().tril(-1) / 4
        system = products + torch.eye(S, dtype=y.dtype)
        if left:
            found = torch.linalg.solve_triangular(system, heads, upper=False, unitriangular=True)
        else:
            found = torch.linalg.solve_triangular(system, heads.mT, upper=False, left=False).mT
        return found.transpose(1, 2).flatten(-2)

    check(Between(solved, 96), randn(B, S, D), split=PAIR, collectives=ONE, moves={"enter": 1})


def test_vectors() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.v = nn.Linear(D, 96), nn.Parameter(torch.randn(96))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.up(x.cumsum(-1)).tanh()
            return y @ self.v, torch.mv(y.flatten(0, 1), self.v)

    check(Model(), randn(B, S, D), split={"up.weight": 0, "up.bias": 0, "v": 0}, collectives={"all_reduce": 2})


class Einsums(nn.Module):
    """Attention with weights that keep heads and features apart, by einsum throughout."""

    def __init__(self, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.ParameterList(nn.Parameter(torch.randn(D, heads, 16)) for _ in range(3))
        self.biases = nn.ParameterList(nn.Parameter(torch.randn(heads, 16)) for _ in range(3 * bias))
        self.out = nn.Parameter(torch.randn(heads, 16, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsd,dhe->bshe", x, w) for w in self.qkv)
        if len(self.biases):
            q, k, v = q + self.biases[0], k + self.biases[1], v + self.biases[2]
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / 4
        mixed = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)
        return torch.einsum("bshd,hdo->bso", mixed, self.out)


@pytest.mark.parametrize("heads", [4, 5])
def test_attention_by_einsum(heads: int) -> None:
    split = {f"qkv.{i}": 1 for i in range(3)} | {f"biases.{i}": 0 for i in range(3)} | {"out": 0}
    check(Einsums(heads), randn(B, S, D), split=split, collectives=ONE, moves={"enter": 1})


# Attention -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention with its own projections; key-value heads repeated by sdpa itself or before it."""

    def __init__(self, count: int, kv: int, size: int = 8, by: str = "gqa", causal: bool = True, bias: bool = True,
                 mask: str = "", norm: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.count, self.kv, self.size, self.by, self.causal, self.mask = count, kv, size, by, causal, mask
        self.q = nn.Linear(D, count * size, bias=bias)
        self.k, self.v = nn.Linear(D, kv * size, bias=bias), nn.Linear(D, kv * size, bias=bias)
        self.o = nn.Linear(count * size, D, bias=bias)
        self.q_norm = nn.RMSNorm(size) if norm else None
        self.k_norm = nn.LayerNorm(size) if norm else None
        if mask == "per head":
            self.register_buffer("slopes", torch.arange(count) / 7.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.size)) for p in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        groups, mask = self.count // self.kv, None
        if self.by == "expand":
            k, v = (y[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for y in (k, v))
        elif self.by == "repeat_interleave":
            k, v = (y.repeat_interleave(groups, 1) for y in (k, v))
        length = torch.arange(x.shape[1])
        if self.mask == "boolean":
            mask = (length[:, None] >= length[None, :])[None, None].expand(x.shape[0], 1, -1, -1)
        elif self.mask == "per head":
            mask = self.slopes.view(1, -1, 1, 1) * (length[None, :] - length[:, None])
        elif self.mask == "additive":
            mask = (length[None, :] - length[:, None]).to(x.dtype)
        if self.by == "hand":
            scores = q @ k.transpose(-1, -2) * self.size**-0.5
            y = (scores if mask is None else scores + mask).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=self.causal and mask is None, enable_gqa=self.by == "gqa"
            )
        return self.o(y.transpose(1, 2).flatten(2))


def attention_split(bias: bool = True, shared: bool = True) -> dict[str, int]:
    """What is split of an :class:`Attention`: all its heads; the shared ones unless every rank needs all."""
    found = {}
    for name in "qkv" if shared else "q":
        found |= {f"{name}.weight": 0} | ({f"{name}.bias": 0} if bias else {})
    return {**found, "o.weight": 1}


@pytest.mark.parametrize("by", ["gqa", "expand", "repeat_interleave"])
@pytest.mark.parametrize(
    ("count", "kv", "tps"),
    [(5, 5, (2, 3, 4)), (8, 8, (2, 3, 4)), (8, 2, (2, 4)), (12, 3, (2, 3, 4)), (12, 6, (4,)), (20, 5, (8,))],
)
def test_grouped_attention(count: int, kv: int, tps: tuple[int, ...], by: str) -> None:
    check(Attention(count, kv, 12, by=by), randn(B, S, D), split=attention_split(), collectives=ONE, tps=tps)


def test_more_ranks_than_key_value_heads() -> None:
    replicated, *_ = check(Attention(8, 2, 12), randn(B, S, D), split=attention_split(), tps=(4,))
    assert [len(s) for s in replicated.weight_layouts["k.weight"].dims[0].ranks] == [12] * 4
    assert replicated.weight_layouts["k.weight"].dims[0].replicas == ((0, 1), (2, 3))
    assert replicated.weight_layouts["q.weight"].dims[0].disjoint
    uneven, *_ = check(Attention(20, 5, 8), randn(B, S, D), split=attention_split(), tps=(8,))
    assert uneven.weight_layouts["k.weight"].dims[0].replicas == ((0, 1), (2, 3), (4, 5), (6,), (7,))
    assert uneven.weight_layouts["q.weight"].dims[0].counts == (16, 16, 16, 16, 16, 16, 32, 32)


@pytest.mark.parametrize("by", ["gqa", "expand", "hand"])
def test_multi_query_attention(by: str) -> None:
    check(Attention(9, 1, by=by, causal=False), randn(B, S, D), split=attention_split(shared=False), collectives=ONE)


def test_25_heads_on_8_ranks() -> None:
    program, *_ = check(Attention(25, 25), randn(B, S, D), split=attention_split(), collectives=ONE, tps=(8,))
    assert program.weight_layouts["q.weight"].dims[0].counts == (32, *[24] * 7)


@pytest.mark.parametrize("mask", ["", "boolean", "per head", "additive"])
@pytest.mark.parametrize("by", ["gqa", "sdpa", "hand"])
def test_masks(mask: str, by: str) -> None:
    model = Attention(8, 8, by=by, mask=mask, causal=by == "sdpa", bias=False)
    check(model, randn(B, S, D), split=attention_split(bias=False), collectives=ONE)


@pytest.mark.parametrize("kv", [6, 2])
def test_norms_per_head(kv: int) -> None:
    check(Attention(6, kv, 16, norm=True), randn(B, S, D), split=attention_split(), collectives=ONE)


class Fused(nn.Module):
    """Attention whose queries, keys and values come from one product, in one of the orders in use."""

    def __init__(self, order: str, count: int, kv: int, size: int = 8) -> None:
        super().__init__()
        self.order, self.count, self.kv, self.size = order, count, kv, size
        self.qkv, self.o = nn.Linear(D, (count + 2 * kv) * size), nn.Linear(count * size, D)

    def forward(self, x: Tensor) -> Tensor:
        y, n, h = self.qkv(x), self.count, self.size
        if self.order == "3 H D":
            q, k, v = y.unflatten(-1, (3, n, h)).unbind(-3)
        elif self.order == "H 3 D":
            q, k, v = y.unflatten(-1, (n, 3, h)).unbind(-2)
        elif self.order == "H 3D":
            q, k, v = y.unflatten(-1, (n, 3 * h)).chunk(3, -1)
        elif self.order == "KV g+2 D":
            y = y.unflatten(-1, (self.kv, n // self.kv + 2, h))
            q, k, v = y[..., :-2, :].flatten(-3, -2), y[..., -2, :], y[..., -1, :]
        else:
            q, k, v = (p.unflatten(-1, (-1, h)) for p in y.split([n * h, self.kv * h, self.kv * h], -1))
        q, k, v = (p.transpose(1, 2) for p in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=n != self.kv)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("order", "count", "kv", "tps"),
    [("3 H D", 5, 5, (2, 3, 4)), ("H 3 D", 5, 5, (2, 3, 4)), ("H 3D", 8, 8, (3, 4)), ("KV g+2 D", 12, 3, (2, 3)),
     ("KV g+2 D", 8, 4, (4,)), ("q|k|v", 8, 2, (2, 4)), ("q|k|v", 5, 5, (3,)), ("q|k|v", 12, 3, (3, 4))],
)  # fmt: skip
def test_fused_projections(order: str, count: int, kv: int, tps: tuple[int, ...]) -> None:
    split = {"qkv.weight": 0, "qkv.bias": 0, "o.weight": 1}
    check(Fused(order, count, kv, 12), randn(B, S, D), split=split, collectives=ONE, tps=tps)


# Norms, look-ups, losses, sums -----------------------------------------------------------------------


def test_norms_over_whole_features() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(D), nn.RMSNorm(D)
            self.a, self.b = Between(F.gelu, 96), Between(F.silu, 96)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(self.first(x))
            return x + self.b(self.second(x))

    split = {f"{m}.{n}": d for m in "ab" for n, d in PAIR.items()}
    check(Model(), randn(B, S, D), split=split, collectives={"all_reduce": 2}, moves={"enter": 2})


def test_two_branches_cost_one_reduction() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention, self.mlp = nn.LayerNorm(D), Attention(6, 6, 16), Between(F.gelu, 96)
            self.mlp.forward = lambda x: self.mlp.down(F.gelu(self.mlp.up(x)))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x - (self.attention(y) * 0.5 + self.mlp(y)) / x.shape[1]

    split = {f"attention.{n}": d for n, d in attention_split().items()} | {f"mlp.{n}": d for n, d in PAIR.items()}
    check(Model(), randn(B, S, D), split=split, collectives=ONE, moves={"enter": 1})


def test_scales_and_offsets_per_feature() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, 96), nn.Linear(96, D)
            self.per_feature, self.per_head = nn.Parameter(torch.ones(96)), nn.Parameter(torch.ones(12, 1))
            self.inside = nn.Parameter(torch.ones(8))
            self.register_buffer("mask", torch.arange(96) % 3 == 0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x.cumsum(-1)) * self.per_feature
            y = y.masked_fill(self.mask, 0.25).unflatten(-1, (12, 8))
            y = (y * self.per_head + self.inside).softmax(-1).flatten(-2)
            return self.down(torch.where(self.mask, y, y.tanh())).cumsum(-1)

    split = {"up.weight": 0, "up.bias": 0, "per_feature": 0, "per_head": 0, "down.weight": 1}
    check(Model(), randn(B, S, D), split=split, collectives=ONE)


class Language(nn.Module):
    """Embedding, an MLP and a head; with labels, the loss too."""

    def __init__(self, words: int, tied: bool, padding: int | None = None, **options: object) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(words, D, padding_idx=padding), Between(F.silu, 96)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, words, bias=not tied)
        self.options = options
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.norm(self.mlp(self.embed(ids))))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **self.options)


def ids(words: int, ignore: int | None = None) -> Tensor:
    found = torch.randint(0, words, (2, 7), generator=torch.Generator().manual_seed(3))
    return found if ignore is None else found.where(torch.arange(14).view(2, 7) % 3 != 1, ignore)


MLP = {f"mlp.{n}": d for n, d in PAIR.items()}


@pytest.mark.parametrize("padding", [None, 3])
def test_vocabulary_untied(padding: int | None) -> None:
    tokens = ids(601)
    tokens[0, :3] = 3
    split = {"embed.weight": 0, "head.weight": 0, "head.bias": 0} | MLP
    check(Language(601, tied=False, padding=padding), tokens, split=split,
          collectives={"all_reduce": 2, "all_gather": 1})  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 5}, {"ignore_index": 5, "reduction": "sum"},
     {"ignore_index": -100, "reduction": "none"}],
    ids=str,
)  # fmt: skip
def test_cross_entropy(options: dict[str, object]) -> None:
    labels = ids(601, ignore=int(options.get("ignore_index", -100)))
    check(Language(601, tied=True, **options), ids(601), labels, split={"embed.weight": 0} | MLP,
          collectives={"all_reduce": 2, "vocab_parallel_cross_entropy": 1})  # fmt: skip


CLASS_WEIGHTS = torch.rand(601, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_smoothed_labels_and_weighted_classes(reduction: str, smoothing: float, weighted: bool) -> None:
    weight = CLASS_WEIGHTS if weighted else None
    model = Language(601, tied=True, reduction=reduction, label_smoothing=smoothing, weight=weight)
    check(model, ids(601), ids(601, ignore=-100), split={"embed.weight": 0} | MLP,
          collectives={"all_reduce": 2, "vocab_parallel_cross_entropy": 1})  # fmt: skip


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flat": lambda x, t: F.nll_loss(F.log_softmax(x.flatten(0, 1), -1), t.flatten()),
    "flattened after": lambda x, t: F.nll_loss(x.log_softmax(-1).view(-1, 601), t.view(-1), reduction="sum"),
    "cast": lambda x, t: F.nll_loss(F.log_softmax(x, -1, dtype=torch.float64).flatten(0, 1), t.flatten()),
    "classes second": lambda x, t: F.cross_entropy(x.transpose(1, 2), t),
    "classes second, each": lambda x, t: F.cross_entropy(x.transpose(1, 2), t, reduction="none", ignore_index=5) * 2,
    "classes second, by hand": lambda x, t: F.nll_loss(F.log_softmax(x.mT, 1), t, weight=CLASS_WEIGHTS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_written_by_hand(name: str) -> None:
    class Model(Language):
        def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
            return LOSSES[name](super().forward(ids), labels)

    labels = ids(601, ignore=5 if "each" in name else -100)
    check(Model(601, tied=True), ids(601), labels, split={"embed.weight": 0} | MLP,
          collectives={"all_reduce": 2, "vocab_parallel_cross_entropy": 1})  # fmt: skip


ENDS: dict[str, Callable[[Tensor], object]] = {
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax": lambda x: (x / 0.7).softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "the best": lambda x: x.argmax(-1),
    "the best and its logit": lambda x: x.max(-1),
    "the last one's best": lambda x: x[:, -1].argmax(-1),
}


@pytest.mark.parametrize("name", ENDS)
def test_logits_are_gathered_for_what_mixes_them(name: str) -> None:
    class Model(Language):
        def forward(self, ids: Tensor, labels: Tensor | None = None) -> object:
            return ENDS[name](super().forward(ids))

    split = {"embed.weight": 0, "head.weight": 0, "head.bias": 0} | MLP
    check(Model(601, tied=False), ids(601), split=split, collectives={"all_reduce": 2, "all_gather": 1})


def test_detach_stops_gradients() -> None:
    check(Between(lambda y: y * y.detach() + y.tanh().detach(), 96), randn(B, S, D), split=PAIR, collectives=ONE)


def test_a_pending_sum_times_a_size() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Between(torch.tanh, 96)

        def forward(self, x: Tensor) -> Tensor:
            y = self.mlp.down(self.mlp.up(x.cumsum(-1)).tanh()) * x.shape[1] / x.shape[0]
            return (-y + x.sum(-1, keepdim=True)).cumsum(-1)

    check(Model(), randn(B, S, D), split=MLP, collectives=ONE, moves={"enter": 1})


def test_dropout_on_shards_differs_between_ranks_and_is_scaled() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, 96), nn.Linear(96, D, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(self.up(x.cumsum(-1)), 0.25)).cumsum(-1)

    model = scrambled(Model())
    with torch.no_grad():  # every neuron gives 1, and the first output counts those that are left
        model.up.weight.zero_()
        model.up.bias.fill_(1)
        model.down.weight.zero_()
        model.down.weight[0] = 2.0 ** torch.arange(96)
    inputs = torch.randn(50, 40, D, dtype=torch.float64)
    program = shard_graph(captured_of(model, inputs), 2)
    assert called(program.graph, ["random_per_rank"]) == {"random_per_rank": 1}
    parallel = simulation(model, program)
    with torch.no_grad():
        model.down.weight[0] = 1
        kept = parallel(inputs)[..., 0] * 0.75
    assert parallel.divergence == 0.0
    assert abs(float(kept.mean()) / 96 - 0.75) < 0.01
    with torch.no_grad():
        model.down.weight[0, 48:] = -1  # were the ranks' masks the same, their counts would cancel
        assert parallel(inputs)[..., 0].abs().max() > 0


def test_dropout_on_whole_values_is_the_same_on_all_ranks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Between(torch.tanh, 96), Between(torch.tanh, 96)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(self.a(x), 0.5))

    model = scrambled(Model())
    inputs = randn(B, S, D)
    program = shard_graph(captured_of(model, inputs), 3)
    assert called(program.graph, ["random_same"]) == {"random_same": 1}
    torch.manual_seed(7)
    parallel = simulation(model, program)
    results = run(parallel, model, [inputs])
    assert parallel.divergence == 0.0
    torch.manual_seed(7)
    assert max(run(model, model, [inputs]).differences(results).values()) < 1e-10
