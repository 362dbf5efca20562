"""Every op rule against real arithmetic.

Most ops are tested *between* two products, ``down(op(up(x)))``: if the rule follows its labels, ``up`` is
split by rows, ``down`` by columns, and one ``all_reduce`` is all the communication there is. A rule that
falls back to whole values fails by its collectives even though its numbers are right.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.harness import called, check, randn

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
    "batch into heads": lambda y: heads(y).transpose(1, 2).flatten(0, 1).tanh().unflatten(0, (B, 12)).transpose(1, 2).flatten(-2),
    "unsqueeze and squeeze": lambda y: y.unsqueeze(1).tanh().squeeze(1),
    "squeeze of nothing": lambda y: heads(y, 4).squeeze(-2).flatten(-2).squeeze(),
    "permute": lambda y: heads(y).permute(2, 0, 3, 1).tanh().permute(1, 3, 0, 2).flatten(-2),
    "transpose": lambda y: y.transpose(0, 2).tanh().transpose(0, 2),
    "movedim": lambda y: heads(y).movedim(-2, 0).movedim(0, -2).flatten(-2),
    "expand": lambda y: y.unsqueeze(2).expand(-1, -1, 7, -1).tanh().sum(2),
    "repeat": lambda y: y.unsqueeze(2).repeat(1, 1, 7, 1).tanh().sum(2),
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
    "cat": lambda y: torch.cat([y, y.tanh(), y * 2], -1),
    "cat over the sequence": lambda y: torch.cat([y, y[:, :1]], 1),
    "cat inside heads": lambda y: torch.cat([-heads(y, 6)[..., 5:], heads(y, 6)[..., :5]], -1).flatten(-2),
    "stack": lambda y: torch.stack([y, y.tanh()], -1).flatten(-2),
    "stack outside": lambda y: torch.stack([y, y.tanh()], 2).flatten(-2),
    "stack and unbind": lambda y: torch.mul(*torch.stack([y, y.tanh()]).unbind(0)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_movement(name: str) -> None:
    check(Between(VIEWS[name], 60), randn(B, S, D), split=PAIR, collectives=ONE, moves={"enter": 1})


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
    check(Between(POINTWISE[name], 60), randn(B, S, D), split=PAIR, collectives=ONE, moves={"enter": 1})


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
    check(Between(REDUCTIONS[name], 60), randn(B, S, D), split=PAIR, collectives=ONE, moves={"enter": 1})


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
    for op in (lambda y: y.softmax(-1), lambda y: y.amax(-1, keepdim=True) + y, lambda y: y.cumsum(-1), lambda y: F.layer_norm(y, (60,))):
        check(Between(op, 60), randn(B, S, D), split={}, collectives={}, moves={}, tps=(2,))


OPAQUE: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda y: y.roll(1, -1),
    "sort": lambda y: y.sort(-1)[0],
    "topk": lambda y: y.topk(40, -1)[0],
    "flip of two dims": lambda y: heads(y).flip(-1, -2).flatten(-2),
    "views across factors": lambda y: heads(y).transpose(-1, -2).reshape(*y.shape[:-1], 15, 4).transpose(-1, -2).flatten(-2),
    "slice of batch and features": lambda y: y.flatten(1)[:, 60:].unflatten(-1, (-1, 60)),
    "repeat of a long dim": lambda y: y.repeat(1, 1, 2),
    "tril": lambda y: y.tril(),
    "pixel shuffle": lambda y: F.pixel_shuffle(heads(y), 2).sum((-1, -2)) if y.shape[-1] == -1 else y.tril(1),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_an_op_without_a_rule_is_right_all_the_same(name: str) -> None:
    check(Between(OPAQUE[name], 60), randn(B, S, D), tps=(2, 3))
