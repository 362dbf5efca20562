"""Golden texts of the rewritten graph: for all ranks, with its enters, and for one rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from autotp.program.graph_text import graph_text
from passes import (
    assign,
    decide,
    localize,
    propagate,
    shard,
)
from passes import enter as insert_enters
from passes.graphs import op_name
from passes.layouts.sharded_value import PerRank
from tests.passes.golden import Attention, Fused, Small, captured, captured_text, case, mlp, spelled, x


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


@case("shard/windows")
def shard_windows() -> str:
    """Windows of the sequence are cut out of each rank's features, without a gather."""
    layers = {"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}
    return shard_text(Small(lambda s, x: s.down(s.up(x).unfold(1, 2, 1).sum(-1)), **layers), 2)


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
