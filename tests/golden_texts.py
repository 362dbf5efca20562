"""The golden texts: each a pass on a small model, before and after."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import fx, nn

from autotp.capture import Captured, capture
from autotp.text import graph_text
from passes import (
    assign,
    canonicalize,
    decide,
    differentiable,
    enter,
    functionalize,
    localize,
    propagate,
    shard,
    simplify,
)
from passes.graphs import is_tensor, op_name, shape

FOLDER = Path(__file__).parent / "golden"


class Impure(nn.Module):
    """Changes its own values in place, and computes something without gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y += 1
        with torch.no_grad():
            angle = x.cos()
        return y + angle


class Padded(nn.Module):
    """Does nothing, four times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x.to(torch.float32).contiguous(), 0.1, training=False)
        return x[:, :].exp()


class Parts(nn.Module):
    """Takes parts, and joins and repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (x * self.scale).chunk(2, dim=-1)
        both = torch.stack([second, first], dim=2)
        return both.repeat_interleave(3, dim=2).view(x.shape[0], x.shape[1], -1)


class MLP(nn.Module):
    """A norm, an MLP and a residual: a transformer block's second half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 99), nn.Linear(99, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Grouped-query attention with one fused projection ``[q q q q q q | k k | v v]``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(96, (6 + 2 + 2) * 16, bias=False), nn.Linear(96, 96, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).split([96, 32, 32], dim=-1)
        q, k, v = (t.view(batch, length, -1, 16).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(3, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, 96))


class Parallel(nn.Module):
    """Attention and MLP side by side, each behind a norm of its own, as in GPT-NeoX."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(96), nn.LayerNorm(96)
        self.attention, self.up, self.down = Attention(), nn.Linear(96, 128), nn.Linear(128, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.norm1(x)) + self.down(F.gelu(self.up(self.norm2(x)))) + x


def _raw(model: nn.Module, features: int) -> Captured:
    """A capture on which no pass has run yet."""
    with mock.patch("autotp.capture._prepare", return_value=[]):
        return capture(model.eval(), (torch.zeros(2, 5, features),), {})


def _captured(model: nn.Module, features: int) -> Captured:
    return capture(model.eval(), (torch.zeros(2, 5, features),), {})


def _text(graph: fx.Graph) -> str:
    """A captured graph, one line a node."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
        elif node.op == "get_attr":
            lines.append(f"{node.name} = self.{node.target}")
        elif node.op != "placeholder":
            args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
            sizes = f"  # [{', '.join(map(str, shape(node)))}]" if is_tensor(node) else ""
            lines.append(f"{node.name} = {op_name(node).removeprefix('aten.')}({args}){sizes}")
    return "\n".join(lines)


def _tidy(text: str) -> str:
    """Symbols renamed in order of appearance: their numbers are torch's and change."""
    names: dict[str, str] = {}
    text = re.sub(r"\bs\d+\b", lambda m: names.setdefault(m[0], f"s{len(names)}"), text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _pair(model: nn.Module, before: str, after: str) -> str:
    return _tidy(f"{type(model).__name__}: {type(model).__doc__}\n\nBEFORE\n\n{before}\n\nAFTER\n\n{after}\n")


def _on_graph(model: nn.Module, features: int, *run: Callable[[Captured], Any]) -> str:
    """The text before and after the last of some passes."""
    captured = _raw(model, features)
    for each in run[:-1]:
        each(captured)
    before = _text(captured.graph)
    run[-1](captured)
    return _pair(model, before, _text(captured.graph))


def _functional(captured: Captured) -> None:
    functionalize(captured.graph)
    captured.graph.owning_module = None
    differentiable(captured.graph, captured.parameters)


def _differentiable() -> str:
    captured = _captured(Impure(), 8)
    lines = [f"{n.name:<12} {'yes' if n.meta['grad'] else 'no'}" for n in captured.graph.nodes if n.op != "output"]
    return _pair(Impure(), _text(captured.graph), "a gradient reaches\n" + "\n".join(lines))


def _propagate() -> str:
    captured = _captured(Attention(), 96)
    facts = propagate(captured.graph)
    roots = facts.units.roots()
    users, sources = facts.units.services(roots)
    names: dict[int, str] = {}
    lines = []
    for node in captured.graph.nodes:
        for factor in facts.values[node].factors if node in facts.values else ():
            units = roots[factor.labels].reshape(-1)
            label = [names.setdefault(int(u), f"u{len(names)}") for u in units]
            runs: list[tuple[str, int]] = []
            for x in label:
                runs = [*runs[:-1], (x, runs[-1][1] + 1)] if runs and runs[-1][0] == x else [*runs, (x, 1)]
            said = " ".join(f"{x}*{n}" for x, n in runs) if len(runs) < 14 else f"{len(set(label))} units of 1"
            lines.append(f"{node.name:<28} factors {factor.dims}: {said}")
    served: dict[str, list[str]] = {}
    for user, source in zip(users, sources, strict=True):
        served.setdefault(names[int(source)], []).append(names[int(user)])
    for whom in dict.fromkeys(map(tuple, served.values())):
        by = [s for s, u in served.items() if tuple(u) == whom]
        lines.append(f"{len(by)} units, {by[0]} to {by[-1]}, serve {' '.join(whom)}")
    return _pair(Attention(), _text(captured.graph), "\n".join(lines))


def _decided(model: nn.Module, features: int, tp: int) -> tuple[Captured, Any, Any]:
    captured = _captured(model, features)
    facts = propagate(captured.graph)
    return captured, facts, decide(captured.graph, facts, tp)


def _decide() -> str:
    captured, _, decision = _decided(Attention(), 96, 4)
    lines = [f"{n}: {layout}" for n, layout in decision.stored.items()]
    return _pair(Attention(), _text(captured.graph), "for 4 ranks\n" + "\n".join(lines))


def _assign() -> str:
    captured, facts, decision = _decided(Attention(), 96, 4)
    layouts = assign(captured.graph, facts, decision.stored, 4)
    before = "\n".join(f"{n}: {layout}" for n, layout in decision.stored.items())
    return _pair(Attention(), before, "\n".join(f"{n.name:<28} {layout}" for n, layout in layouts.items()))


def _sharded(model: nn.Module, features: int, tp: int) -> tuple[Captured, fx.Graph]:
    captured, facts, decision = _decided(model, features, tp)
    layouts = assign(captured.graph, facts, decision.stored, tp)
    graph = shard(captured.graph, facts, layouts, decision.stored, tp).graph
    graph.eliminate_dead_code()
    return captured, graph


def _shard() -> str:
    captured, graph = _sharded(MLP(), 64, 4)
    return _pair(MLP(), _text(captured.graph), graph_text(graph, "all ranks"))


def _enter() -> str:
    _, graph = _sharded(Parallel(), 96, 2)
    before = graph_text(graph, "all ranks")
    enter(graph)
    return _pair(Parallel(), before, graph_text(graph, "all ranks"))


def _localize() -> str:
    _, graph = _sharded(Attention(), 96, 4)
    enter(graph)
    return _pair(Attention(), graph_text(graph, "all ranks"), graph_text(localize(graph, 1), "rank 1 of 4", 1))


TEXTS: dict[str, Callable[[], str]] = {
    "functionalize": lambda: _on_graph(Impure(), 8, _functional),
    "differentiable": _differentiable,
    "simplify": lambda: _on_graph(Padded(), 8, _functional, lambda c: simplify(c.graph)),
    "canonicalize": lambda: _on_graph(
        Parts(), 8, _functional, lambda c: simplify(c.graph), lambda c: canonicalize(c.graph)
    ),
    "propagate": _propagate,
    "decide": _decide,
    "assign": _assign,
    "shard": _shard,
    "enter": _enter,
    "localize": _localize,
}
