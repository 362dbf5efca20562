"""Golden texts of the passes that clean a captured graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import (
    canonicalize,
    differentiable,
    functionalize,
    inline,
)
from passes import simplify as simplified
from tests.passes.golden import Small, captured_text, case, x


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
