"""Golden texts of the plan: units, what is split, and the layouts that values then have."""

from __future__ import annotations

import re

import numpy as np
from torch import fx, nn

from passes import (
    Layout,
    Reason,
    assign,
    decide,
    propagate,
)
from passes.layouts.facts import Facts
from tests.passes.golden import Attention, Fused, captured, captured_text, case, mlp, x


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
