"""Golden texts of the passes that make a rank's graph fast: the graph without a pass, and with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.capture.capture import capture
from autotp.program.graph_text import lowered_text
from autotp.program.sharded_program import shard_graph
from passes import Lowering, localize, lower
from tests.passes.golden import Small, case, x


def lowered(
    model: nn.Module, *inputs: Tensor, without: str, then: str = "", tp: int = 1, grad: bool = True,
    written: Mapping[int, int] | None = None,
) -> str:  # fmt: skip
    """A rank's graph as the passes named in ``then`` leave it, and what the pass named in ``without`` makes of that."""
    captured = capture(model, inputs, {})
    graph = localize(shard_graph(captured, tp).graph, 0)
    before = dataclasses.replace(Lowering.none(), **dict.fromkeys(then.split(), True))
    texts = []
    for title, lowering in (("Before", before), ("After", dataclasses.replace(before, **{without: True}))):
        made = lower(graph, 0, captured.constants, captured.regions, lowering, grad=grad, written=written)
        texts.append(f"{title}:\n\n{lowered_text(made.graph, f'rank 0 of {tp}', made.repeated)}")
    return "\n\n".join(texts)


class Causal(nn.Module):
    """A causal mask as models make it."""

    def forward(self, q: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, q, q, places[None, :] <= places[:, None])


class Sliding(nn.Module):
    """A mask that says more: no keys that are too far back."""

    def forward(self, q: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        seen = (places[None, :] <= places[:, None]) & (places[None, :] > places[:, None] - 3)
        return F.scaled_dot_product_attention(q, q, q, seen)


class Grouped(nn.Module):
    """Two query heads to each of two key-value heads."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k = x.view(b, n, 4, 8).transpose(1, 2), x[..., :16].view(b, n, 2, 8).transpose(1, 2)
        repeated = k[:, :, None].expand(b, 2, 2, n, 8).reshape(b, 4, n, 8)
        return F.scaled_dot_product_attention(q, repeated, repeated)


class Rotated(nn.Module):
    """Queries, keys and values of one input; queries and keys are rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.v = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        def rotated(t: Tensor) -> Tensor:
            return t * cos + torch.cat((-t[..., 4:], t[..., :4]), dim=-1) * sin

        q, k, v = (f(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        return rotated(q) + 0.5, rotated(k).exp(), v.relu()


@case("lowering/fold")
def fold() -> str:
    """A product with one and a cast to what a value is are gone; what is the same in every call is a constant."""

    def run(self: Any, x: Tensor) -> Tensor:
        return (self.up(x) * 1.0).to(torch.float32) + torch.arange(8) * 2

    return lowered(Small(run, up=nn.Linear(8, 8)), x(2, 5, 8), without="fold")


@case("lowering/causal")
def causal() -> str:
    """A mask that says no more than that no query sees later keys is ``is_causal``, and is not made."""
    return lowered(Causal(), x(2, 4, 6, 8), without="causal")


@case("lowering/causal_not_sliding")
def sliding() -> str:
    """A mask that says more stays."""
    return lowered(Sliding(), x(2, 4, 6, 8), without="causal")


@case("lowering/deduplicate")
def deduplicate() -> str:
    """Two layers that make the same table make it once."""

    def run(self: Any, x: Tensor) -> Tensor:
        h = x + torch.arange(x.shape[1]).to(x.dtype)[:, None].sin()
        return self.up(h) + torch.arange(x.shape[1]).to(x.dtype)[:, None].sin()

    return lowered(Small(run, up=nn.Linear(8, 8)), x(2, 5, 8), without="deduplicate")


@case("lowering/grouped_query")
def grouped_query() -> str:
    """Attention reads each key-value head once for both query heads that share it."""
    return lowered(Grouped(), x(2, 6, 32), without="grouped_query")


@case("lowering/fuse_norm")
def fuse_norm() -> str:
    """An RMS norm that is written out, with its weight, is one op."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    return lowered(Norm(), x(2, 5, 8), without="fuse")


@case("lowering/fuse_gelu")
def fuse_gelu() -> str:
    """GELU by its tanh approximation, written out, is one op."""

    def run(self: Any, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))

    return lowered(Small(run), x(2, 5, 8), without="fuse")


@case("lowering/merge")
def merge() -> str:
    """Linears of one input are one product, in which the weights lie side by side; the gate and the up projection."""

    def run(self: Any, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    layers = {n: nn.Linear(64, 96) for n in ("gate", "up")} | {"down": nn.Linear(96, 64)}
    return lowered(Small(run, **layers), x(2, 5, 64), without="merge", tp=2)


@case("lowering/merge_forward")
def merge_forward() -> str:
    """Without a backward it is a plain product of one weight."""
    return lowered(Rotated(), x(2, 5, 32), x(5, 8), x(5, 8), without="merge", grad=False)


@case("lowering/fuse_adjacent")
def fuse_adjacent() -> str:
    """Queries, keys and values are viewed as heads and transposed at once, queries and keys are rotated at once."""
    return lowered(Rotated(), x(2, 5, 32), x(5, 8), x(5, 8), without="fuse_adjacent", then="merge", tp=2)


@case("lowering/split")
def split() -> str:
    """Parts that make up a whole are cut out in one call: in a backward that is one concatenation."""
    return lowered(
        Rotated(), x(2, 5, 32), x(5, 8), x(5, 8), without="split", then="merge fuse_adjacent deduplicate", tp=2
    )


@case("lowering/cache_in_place")
def cache_in_place() -> str:
    """Without a backward, what a cache holds after a call is not a copy of what it held before."""

    class Keys(nn.Module):
        def forward(self, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
            keys = torch.cat([keys, x * 2], 1)
            return (x @ keys.transpose(1, 2)).softmax(-1), keys

    return lowered(Keys(), x(2, 1, 8), x(2, 5, 8), without="cache_in_place", grad=False)


@case("lowering/cache_of_fixed_size")
def cache_of_fixed_size() -> str:
    """What goes back into the memory that it came from is written there, also into a slice of it."""

    class Keys(nn.Module):
        def forward(self, x: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            keys = keys.index_copy(1, at, x)
            values = values.slice_scatter(values[: x.shape[0]].slice_scatter(x * 2, 1, 3, 5), 0, 0, x.shape[0])
            return (x @ keys[: x.shape[0]].transpose(1, 2)).softmax(-1), keys, values

    given = x(2, 2, 8), torch.tensor([4, 1]), x(2, 9, 8), x(4, 9, 8)
    return lowered(Keys(), *given, without="cache_in_place", grad=False, written={1: 2, 2: 3})


@case("lowering/overlap")
def overlap() -> str:
    """Without a backward, what needs no sum is computed between its beginning and its end."""

    def run(self: Any, x: Tensor) -> Tensor:
        h, angles = self.down(self.up(x).relu()), torch.arange(x.shape[1]) * 0.5
        return h * angles.cos()[:, None] + x.exp()

    layers = {"up": nn.Linear(64, 96, bias=False), "down": nn.Linear(96, 64, bias=False)}
    return lowered(Small(run, **layers), x(2, 5, 64), without="overlap", tp=2, grad=False)


@case("lowering/overlap_backward")
def overlap_backward() -> str:
    """With one, a Linear sums its input's gradient over the ranks while it computes its weight's."""

    def run(self: Any, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    layers = {n: nn.Linear(64, 96) for n in ("gate", "up")} | {"down": nn.Linear(96, 64)}
    return lowered(Small(run, **layers), x(2, 5, 64), without="overlap", then="merge", tp=2)


@case("lowering/rematerialize")
def rematerialize() -> str:
    """A norm, and a product with an activation, keep for the backward what they are of; a plain activation stays."""

    def run(self: Any, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (64,), self.scale, 1e-6)
        return F.gelu(self.down(F.silu(self.gate(h)) * self.up(h)))

    layers = {n: nn.Linear(64, 96) for n in ("gate", "up")} | {"down": nn.Linear(96, 64)}
    model = Small(run, **layers)
    model.scale = nn.Parameter(torch.ones(64))
    return lowered(model, x(2, 5, 64), without="rematerialize", tp=2)


@case("lowering/reuse")
def reuse() -> str:
    """Without a backward, the reduction, the residual sum and the activation write over their operands."""

    def run(self: Any, x: Tensor) -> Tensor:
        h = self.into(x)
        return h + self.down(F.silu(self.up(h)))

    layers = {"into": nn.Linear(64, 64), "up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}
    return lowered(Small(run, **layers), x(2, 5, 64), without="reuse", tp=2, grad=False)


@case("lowering/direct_calls")
def direct_calls() -> str:
    """Overloads become torch's C functions, which have the same names here; a slice of known length is ``narrow``."""

    def run(self: Any, x: Tensor) -> Tensor:
        return self.up(x)[..., 2:6].softmax(-1)

    return lowered(Small(run, up=nn.Linear(8, 8)), x(2, 5, 8), without="direct_calls")


class Block(nn.Module):
    """Half a layer; each shifts its input by a table that all make alike."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + torch.arange(x.shape[1]).to(x.dtype)[:, None].sin())
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@case("lowering/repeat")
def repeat() -> str:
    """Layers that do the same are calls of one region: with what the one before made, what all share, own weights."""
    layers = nn.Sequential(Block(), Block(), Block())
    return lowered(layers, x(2, 5, 64), without="repeat", then="deduplicate", tp=2)
