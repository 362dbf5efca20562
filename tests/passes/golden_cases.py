"""Golden texts: what each pass does to small graphs, before and after, written for people to read.

Each text stands beside the tests of its pass (``normalize/golden/inline/no_grad.txt``); ``test_golden.py`` compares,
and ``python -m tests.passes.regenerate`` writes them anew.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autotp.capture.capture import capture
from autotp.capture.captured_graph import CapturedGraph
from autotp.program.graph_text import graph_text
from passes import (
    Layout,
    Reason,
    assign,
    canonicalize,
    decide,
    differentiable,
    functionalize,
    inline,
    localize,
    propagate,
    shard,
)
from passes import enter as insert_enters
from passes import simplify as simplified
from passes.graphs import op_name
from passes.layouts.facts import Facts
from passes.layouts.sharded_value import PerRank

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
"""The texts by name: ``<pass>/<case>``."""


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


def before_and_after(graph: fx.Graph, change: Callable[[fx.Graph], object]) -> str:
    """A graph's text before and after a pass."""
    before = captured_text(graph)
    change(graph)
    return f"Before:\n\n{before}\n\nAfter:\n\n{captured_text(graph)}"


def raw(model: nn.Module, *inputs: Tensor) -> fx.Graph:
    """What torch.export gives, before any pass."""
    shapes = {"x": dict.fromkeys(range(inputs[0].dim() - 1), torch.export.Dim.AUTO)}
    exported = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    targets = {s.arg.name: s.target for s in exported.graph_signature.input_specs if s.kind.name == "PARAMETER"}
    graph = exported.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in targets:
            with graph.inserting_before(node):
                weight = graph.create_node("get_attr", targets[node.name], name=node.name)
            weight.meta = dict(node.meta)
            node.replace_all_uses_with(weight)
            graph.erase_node(node)
    differentiable(graph, set(targets.values()))
    return graph


def standing_alone(graph: fx.Graph) -> fx.Graph:
    """A graph whose weights are names only, as they are once a model is captured."""
    graph.owning_module = None
    return graph


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


# The captured graph, cleaned -----------------------------------------------------------------------


@case("inline/no_grad")
def no_grad() -> str:
    """A region without gradients becomes part of the graph; ``detach`` then stops the gradients."""

    def run(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.exp().sum()
        return self.proj(x) * scale

    return before_and_after(raw(Small(run, proj=nn.Linear(4, 6)), x(2, 3, 4)), inline)


@case("functionalize/in_place")
def in_place() -> str:
    """An in-place op on a value that nothing else sees becomes a function, and later readers read its result."""

    def run(self: Any, x: Tensor) -> Tensor:
        y = self.proj(x)
        y.mul_(2)
        return y + 1

    return before_and_after(raw(Small(run, proj=nn.Linear(4, 6)), x(2, 3, 4)), functionalize)


@case("functionalize/written_part")
def written_part() -> str:
    """What a view shows is changed: the value is made anew, and so is another view of it that is read afterwards."""

    def run(self: Any, x: Tensor) -> Tensor:
        y = self.proj(x)
        across, first = y.transpose(0, 1), y[..., :2]
        first.mul_(3)
        return across + first.sum()

    return before_and_after(raw(Small(run, proj=nn.Linear(4, 6)), x(2, 3, 4)), functionalize)


@case("differentiable/where_gradients_stop")
def where_gradients_stop() -> str:
    """Gradients flow from floating inputs and weights, and stop at ids, at ``detach`` and where there is no slope."""

    def run(self: Any, x: Tensor) -> Tensor:
        y = self.proj(x)
        best = y.argmax(-1, keepdim=True)
        return y.gather(-1, best) * y.detach().exp() + y.round() * x.tanh().sum()

    graph = raw(Small(run, proj=nn.Linear(4, 6)), x(2, 3, 4))
    for node in graph.nodes:
        node.meta.pop("grad", None)
    return before_and_after(graph, lambda g: differentiable(g, {"proj.weight", "proj.bias"}))


@case("simplify/nothing_computed")
def nothing_computed() -> str:
    """What computes nothing goes. A detach is kept where a gradient would otherwise flow, as is a real slice."""

    def run(self: Any, x: Tensor) -> Tensor:
        y = self.proj(x).contiguous().to(x.dtype)
        y = F.dropout(y, 0.5, training=False)[:, :, :]
        unread = y.exp()  # noqa: F841
        return torch.cat([y.detach(), y[..., :3], y.new_zeros(y.shape[0], y.shape[1], 0)], -1)

    graph = standing_alone(raw(Small(run, proj=nn.Linear(4, 6)), x(2, 3, 4)))

    def until_done(graph: fx.Graph) -> None:
        while simplified(graph):
            pass

    return before_and_after(graph, until_done)


@case("canonicalize/parts")
def parts() -> str:
    """Every way to take a part becomes a slice or a select, ``stack`` a ``cat``, ``repeat_interleave`` an expand."""

    def run(self: Any, x: Tensor) -> Tensor:
        a, b = self.proj(x).chunk(2, -1)
        c, _, d = a.unflatten(-1, (3, 2)).unbind(-2)
        return torch.stack([c, d], -1).repeat_interleave(2, 2).flatten(-2) + b[..., :1].view(x.shape[0], -1, 1)

    graph = standing_alone(raw(Small(run, proj=nn.Linear(4, 12)), x(2, 3, 4)))
    return before_and_after(graph, canonicalize)


# What belongs together -----------------------------------------------------------------------------


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


def units_text(graph: fx.Graph, facts: Facts) -> str:
    """For each weight and each of its dims the unit of every index, and which units serve which."""
    roots = facts.units.roots()
    names: dict[int, str] = {}

    def name(label: int) -> str:
        return names.setdefault(int(roots[label]), str(len(names)))

    lines = []
    for node in graph.nodes:
        if node.op == "get_attr" and node in facts.values:
            value = facts.values[node]
            dims = {v: d for d in range(len(value.axes)) for v in value.virtual(d)}
            for factor in value.factors:
                units = " ".join(name(label) for label in factor.labels)
                lines.append(f"{node.target:<14} dim {dims[factor.dims[0]]}   {units}")
    users, sources = facts.units.services(roots)
    lines += [""] if len(users) else []
    for source in dict.fromkeys(s for s in sources.tolist() if s in names):
        served = [names[u] for u in np.unique(users[sources == source]).tolist() if u in names]
        lines.append(f"{names[source]} serves {' '.join(served)}" if served else "")
    return "\n".join(lines).rstrip()


def propagate_text(model: nn.Module) -> str:
    """A captured graph and its units."""
    graph = captured(model, x(2, 3, 4)).graph
    return f"{captured_text(graph)}\n\nUnits, by index:\n\n{units_text(graph, propagate(graph))}"


@case("propagate/mlp")
def propagate_mlp() -> str:
    """A neuron's row of ``up``, its bias and its column of ``down`` are one unit; so is each input feature."""
    return propagate_text(mlp())


@case("propagate/grouped_attention")
def propagate_attention() -> str:
    """All rows of a head are one unit. A key-value head serves two heads, the norm's weight all of them."""
    return propagate_text(Attention())


@case("propagate/fused_attention")
def propagate_fused() -> str:
    """In a fused ``[3, H, D]`` the rows of a head lie in three places and are one unit all the same."""
    return propagate_text(Fused())


# The plan ------------------------------------------------------------------------------------------


def layout_lines(weight_layouts: dict[str, Layout], reasons: dict[str, Reason]) -> str:
    """The plan: each weight's layout, or why it is whole, and up to how many ranks would do."""
    lines = [f"{name:<12} {layout}" for name, layout in weight_layouts.items()]
    for name, reason in reasons.items():
        limit = f" (at most {reason.limit} ranks)" if reason.limit else ""
        lines.append(f"{name:<12} whole{limit}: {settled_line(reason.text)}")
    return "\n".join(lines)


def settled_line(reason: str) -> str:
    """A reason without line numbers."""
    return re.sub(r" \(\S+:\d+\)", "", reason)


def decide_text(model: nn.Module, tp: int) -> str:
    """What is decided for a model of width 64."""
    graph = captured(model, x(2, 3, 64)).graph
    decision = decide(graph, propagate(graph), tp)
    return (
        f"{captured_text(graph)}\n\nOn {tp} ranks:\n\n{layout_lines(decision.weight_layouts, dict(decision.reasons))}"
    )


@case("decide/mlp")
def decide_mlp() -> str:
    """Split by neurons: ``up`` by rows, ``down`` by columns. What belongs to the residual stream stays whole."""
    return decide_text(mlp(64, 95), 3)


@case("decide/grouped_attention")
def decide_attention() -> str:
    """More ranks than key-value heads: ranks 0 and 1 both hold key-value head 0, ranks 2 and 3 head 1."""
    return decide_text(Attention(64, 8, 2, 16), 4)


@case("decide/fused_attention")
def decide_fused() -> str:
    """Five heads on two ranks, in a fused ``[3, H, D]``: three runs of rows for each rank."""
    return decide_text(Fused(64, 5, 16), 2)


# The rewritten graph -------------------------------------------------------------------------------


def rewritten(model: nn.Module, tp: int) -> tuple[fx.Graph, fx.Graph]:
    """The captured graph and the graph for all ranks, before ``enter``."""
    graph = captured(model, x(2, 3, 64)).graph
    facts = propagate(graph)
    weight_layouts = decide(graph, facts, tp).weight_layouts
    sharded = shard(graph, facts, assign(graph, facts, weight_layouts, tp), dict(weight_layouts), tp).graph
    sharded.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return graph, sharded


def states_text(graph: fx.Graph) -> str:
    """A rewritten graph before its types are known: whether each value is whole, split or pending."""
    lines = []
    for node in graph.nodes:
        if node.op == "call_function":
            text = f"{node.name} = {op_name(node).removeprefix('aten.')}({', '.join(map(per_rank, node.args))})"
            lines.append(f"{text:<90}  # {node.meta['state']}")
        elif node.op == "placeholder":
            lines.append(f"{node.name:<90}  # {node.meta['state']}")
        elif node.op == "output":
            lines.append(f"return {spelled(node.args[0])}")
    return "\n".join(lines)


def per_rank(value: Any) -> str:
    """An argument; one that differs between ranks with all its values."""
    if isinstance(value, PerRank):
        return "{" + " | ".join(map(spelled, value.values)) + "}"
    if isinstance(value, (tuple, list)):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return left + ", ".join(map(per_rank, value)) + right
    return spelled(value)


def shard_text(model: nn.Module, tp: int) -> str:
    """Before and after ``shard``."""
    graph, sharded = rewritten(model, tp)
    return f"Before:\n\n{captured_text(graph)}\n\nAfter, for {tp} ranks:\n\n{states_text(sharded)}"


def assign_text(model: nn.Module, tp: int) -> str:
    """The layouts of the weights that were decided, and those that all values then have."""
    graph = captured(model, x(2, 3, 64)).graph
    facts = propagate(graph)
    weight_layouts = decide(graph, facts, tp).weight_layouts
    layouts = assign(graph, facts, weight_layouts, tp)
    lines = [f"{n.name:<32} {layouts[n]}" for n in graph.nodes if n.op == "call_function" and n in layouts]
    weights = "\n".join(f"{name:<32} {layout}" for name, layout in weight_layouts.items())
    return f"{captured_text(graph)}\n\nWeights on {tp} ranks:\n\n{weights}\n\nValues:\n\n" + "\n".join(lines)


@case("assign/grouped_attention")
def assign_attention() -> str:
    """Values follow their weights. Dims are virtual: attention's 8 heads are 2 groups of 4, as keys have 2."""
    return assign_text(Attention(64, 8, 2, 16), 4)


@case("assign/fused_attention")
def assign_fused() -> str:
    """Three runs of rows are one run of heads."""
    return assign_text(Fused(64, 5, 16), 2)


@case("shard/mlp")
def shard_mlp() -> str:
    """The pair becomes column- and row-parallel; ``down``'s bias is added once, after the reduction."""
    return shard_text(mlp(64, 96), 2)


@case("shard/heads")
def shard_heads() -> str:
    """Sizes that were baked in become each rank's own, ``{rank 0 | rank 1}``: 5 heads are 3 and 2."""

    def run(self: Any, x: Tensor) -> Tensor:
        y = self.up(x).view(x.shape[0], x.shape[1], 5, 20).softmax(-1)
        return self.down(y.reshape(x.shape[0], x.shape[1], 100))

    return shard_text(Small(run, up=nn.Linear(64, 100), down=nn.Linear(100, 64)), 2)


@case("shard/one_reduction")
def shard_one_reduction() -> str:
    """Sums of pending sums stay pending: two branches beside each other cost one ``all_reduce``."""
    layers = {n: nn.Linear(64, 96) for n in ("up", "side")} | {n: nn.Linear(96, 64) for n in ("down", "out")}
    return shard_text(Small(lambda s, x: x + s.down(s.up(x).relu()) + s.out(s.side(x).tanh()), **layers), 2)


@case("enter/norms")
def enter_norms() -> str:
    """Whole values enter where their gradients would be partial: the residual once, and in the same reduction the
    weights of both norms. Types: I invariant, R replicated, V varying, P pending."""
    layers: dict[str, nn.Module] = {n: nn.Linear(64, 96) for n in ("up", "side")}
    layers |= {n: nn.Linear(96, 64, bias=False) for n in ("down", "out")}
    layers |= {"norm": nn.LayerNorm(64), "other": nn.LayerNorm(64)}

    def run(self: Any, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu()) + self.out(self.side(self.other(x)).tanh())

    _, graph = rewritten(Small(run, **layers), 2)
    before = states_text(graph)
    insert_enters(graph)
    return f"Before:\n\n{before}\n\nAfter:\n\n{graph_text(graph, 'all ranks')}"


@case("enter/replicated_heads")
def enter_replicated() -> str:
    """A key-value head that two ranks hold enters over just those two, and its gradient is their sum."""
    _, graph = rewritten(Attention(64, 8, 2, 16), 4)
    insert_enters(graph)
    return graph_text(graph, "all ranks")


@case("localize/rank")
def localize_rank() -> str:
    """One rank's graph: every constant that differs between ranks is now its own."""
    _, graph = rewritten(Fused(64, 5, 16), 2)
    insert_enters(graph)
    return f"{graph_text(localize(graph, 0), 'rank 0 of 2')}\n\n\n{graph_text(localize(graph, 1), 'rank 1 of 2')}"
