"""Golden texts: what each pass does to small graphs, before and after, written for people to read.

Each text stands beside the tests of its pass (``normalize/golden/inline/no_grad.txt``), and so do the cases
(``normalize/golden_cases.py``). ``test_golden.py`` compares them with what the passes do;
``python -m tests.passes.regenerate`` writes them anew.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autotp.capture.capture import capture
from autotp.capture.captured_graph import CapturedGraph
from passes.graphs import op_name

HERE = Path(__file__).parent
FOLDERS = {
    "inline": "normalize/golden/inline",
    "functionalize": "normalize/golden/functionalize",
    "differentiable": "normalize/golden/differentiable",
    "simplify": "normalize/golden/simplify",
    "canonicalize": "normalize/golden/canonicalize",
    "propagate": "planning/golden/propagate",
    "decide": "planning/golden/decide",
    "assign": "planning/golden/assign",
    "shard": "sharding/golden/shard",
    "enter": "sharding/golden/enter",
    "localize": "sharding/golden/localize",
    "lowering": "lowering/golden",
}
"""The folder of each pass's texts."""
CASES: dict[str, Callable[[], str]] = {}
"""The texts by name, ``<pass>/<case>``, of the folders that are imported."""


def all_cases() -> dict[str, Callable[[], str]]:
    """The texts of all folders."""
    for folder in dict.fromkeys(path.split("/")[0] for path in FOLDERS.values()):
        importlib.import_module(f"tests.passes.{folder}.golden_cases")
    return CASES


def path_of(name: str) -> Path:
    """The file of a case's text."""
    of_pass, case_name = name.split("/")
    return HERE / FOLDERS[of_pass] / f"{case_name}.txt"


def written() -> set[Path]:
    """The files of all golden texts."""
    return set(HERE.glob("*/golden/**/*.txt"))


def case(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a case."""

    def add(make: Callable[[], str]) -> Callable[[], str]:
        CASES[name] = lambda: settled(f"{inspect.getdoc(make)}\n\n{make()}\n")
        return make

    return add


def settled(text: str) -> str:
    """A text whose symbols are named s0, s1, ... in order of appearance; torch's own names vary."""
    order = dict.fromkeys(re.findall(r"\b[su]\d+\b", text))
    names = {symbol: f"s{i}" for i, symbol in enumerate(order)}
    return re.sub(r"\b[su]\d+\b", lambda m: names[m.group()], re.sub(r" +$", "", text, flags=re.MULTILINE))


def captured_text(graph: fx.Graph) -> str:
    """A captured graph: one line a node, with shapes, and ``no grad`` where gradients stop."""
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr":
            continue
        if node.op == "output":
            lines.append(f"return {spelled(node.args[0])}")
            continue
        call = ", ".join([spelled(a) for a in node.args] + [f"{k}={spelled(v)}" for k, v in node.kwargs.items()])
        text = node.name if node.op == "placeholder" else f"{node.name} = {op_name(node).removeprefix('aten.')}({call})"
        shape = f"[{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else ""
        stops = "" if node.meta.get("grad", True) or not shape else "  no grad"
        lines.append(f"{text:<60}  # {shape}{stops}" if shape else text)
    return "\n".join(lines)


def spelled(value: Any) -> str:
    """An argument: weights by their names, other nodes by theirs."""
    if isinstance(value, fx.Node):
        return f"self.{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, (tuple, list)):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return left + ", ".join(map(spelled, value)) + right
    return "end" if value == 2**63 - 1 else re.sub(r"^torch\.", "", str(value))


def x(*shape: int) -> Tensor:
    """An input."""
    return torch.zeros(shape, requires_grad=True)


class Small(nn.Module):
    """A module from a function of its input and of some linear layers."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def captured(model: nn.Module, *inputs: Tensor) -> CapturedGraph:
    """A captured model, as the passes after ``canonicalize`` see it."""
    return capture(model, inputs, {})


def mlp(width: int = 4, hidden: int = 6, **options: Any) -> nn.Module:
    """``down(relu(up(x)))``."""
    layers = {"up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width)}
    return Small(lambda self, x: self.down(self.up(x).relu()), **layers)


class Attention(nn.Module):
    """Attention with fewer key-value heads than heads, its queries normalized head by head."""

    def __init__(self, width: int = 4, count: int = 4, kv: int = 2, size: int = 2) -> None:
        super().__init__()
        self.size = size
        self.q, self.k = nn.Linear(width, count * size, bias=False), nn.Linear(width, kv * size, bias=False)
        self.v, self.o = nn.Linear(width, kv * size, bias=False), nn.Linear(count * size, width, bias=False)
        self.norm = nn.RMSNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.norm(q), k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """Queries, keys and values of two heads from one product."""

    def __init__(self, width: int = 4, count: int = 2, size: int = 2) -> None:
        super().__init__()
        self.count, self.size = count, size
        self.qkv, self.o = nn.Linear(width, 3 * count * size, bias=False), nn.Linear(count * size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.count, self.size)).transpose(1, 3).unbind(2)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
