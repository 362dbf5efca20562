"""overlap: what does not need a sum over the ranks is computed while it is under way."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from passes import ops
from passes.graphs import op_name
from passes.lowering.local_values import call, is_tensor, local, replace
from passes.lowering.merge import Product, is_weight, side_by_side
from passes.ops import context

__all__ = ["entering_linear", "overlap"]

aten = torch.ops.aten


def entering_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: str, count: int, *parts: torch.Tensor
) -> torch.Tensor:
    """:func:`passes.ops.enter` and :func:`passes.lowering.merge.side_by_side` in one.

    Backward, the sum of the input's gradient over the ranks is under way while the weights' are computed, as in
    Megatron-LM (its ``LinearWithGradAccumulationAndAsyncCommunication``).

    Args:
        x: ``(..., in)``, whole on every rank.
        weight: ``(sum of out, in)``; the parts' memory, without their gradients.
        bias: ``(sum of out,)``, likewise, or None.
        group: over which the input's gradient is summed.
        count: how many weights there are.
        parts: the weights, ``(out, in)`` each, and then the biases, if there are any, ``(out,)`` each.

    Returns:
        ``(..., sum of out)``.
    """
    if torch.is_grad_enabled():
        result: torch.Tensor = Product.apply(x, weight, bias, context.current().group(group), count, *parts)
        return result
    return F.linear(x, weight, bias)


_VIEWS = {"aten.slice", "aten.transpose", "aten.permute", "aten.view", "aten.unsqueeze", "aten.squeeze", "aten.select",
          "aten.expand", "aten.sym_size", "getitem"}  # fmt: skip


def _can_move(node: fx.Node) -> bool:
    """Whether a node only makes a value of others: nothing is moved past one that does more."""
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return node.op in ("placeholder", "get_attr") or getattr(node.target, "__module__", None) == operator.add.__module__


def _computes(nodes: Sequence[fx.Node]) -> bool:
    return any(n.op == "call_function" and op_name(n) not in _VIEWS for n in nodes)


def _forward(graph: fx.Graph) -> int:
    """Put around each sum, between its beginning and its end, what neither makes what is summed nor needs the sum, of
    all that lies between the two nodes next to it that stay."""
    nodes = [n for n in graph.nodes if n.op != "output"]
    bounds = [-1, *(i for i, n in enumerate(nodes) if not _can_move(n)), len(nodes)]
    taken: set[fx.Node] = set()  # what lies between two sums is the first one's
    count = 0
    for before, at, after in zip(bounds, bounds[1:], bounds[2:], strict=False):
        reduction, early, late = nodes[at], nodes[before + 1 : at], nodes[at + 1 : after]
        if reduction.target is not ops.all_reduce:
            continue
        made, needs = {reduction}, {reduction}
        for node in reversed(early):
            if not made.isdisjoint(node.users):
                made.add(node)
        for node in late:
            if not needs.isdisjoint(node.all_input_nodes):
                needs.add(node)
        window = [n for n in early if n not in made and n not in taken and n.op != "placeholder"]
        window += [n for n in late if n not in needs]
        if not _computes(window):
            continue
        taken.update(window)
        shape = local(reduction).shape
        last = begun = call(reduction, ops.start_all_reduce, reduction.args, like=reduction, shape=shape)
        for node in window:
            last.append(node)
            last = node
        replace(reduction, call(reduction, ops.wait, (begun,), like=reduction, shape=shape))
        count += 1
    return count


def _parts(node: fx.Node) -> Sequence[Any] | None:
    """Weight, bias, how many weights, and the weights and biases with gradients, of a Linear; None for another."""
    if node.target is side_by_side:
        return node.args[1:]
    if node.target is not aten.linear.default or node.kwargs:
        return None
    weight, bias = (*node.args[1:], None)[:2]
    if not is_weight(weight, 2) or not (bias is None or is_weight(bias, 1)):
        return None
    return weight, bias, 1, weight, *([] if bias is None else [bias])


def _backward(graph: fx.Graph) -> int:
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=ops.enter)):
        x, group = node.args
        if not is_tensor(x) or len(node.users) != 1:
            continue
        (linear,) = node.users
        if linear.args[0] is not node or (parts := _parts(linear)) is None:
            continue
        weight, bias, many, *each = parts
        args = (x, weight, bias, group, many, *each)
        replace(linear, call(linear, entering_linear, args, like=linear, shape=local(linear).shape))
        graph.erase_node(node)
        count += 1
    return count


def overlap(graph: fx.Graph, grad: bool) -> int:
    """Let ranks compute while sums over them are under way.

    Without a backward, a sum begins as early as it can, and is waited for after all that needs nothing of it. With
    one, the sum of an input's gradient runs beside the products of its weights' gradients.

    Args:
        graph: a rank's graph; changed in place.
        grad: whether a backward follows.

    Returns:
        How many sums have something beside them.
    """
    return _backward(graph) if grad else _forward(graph)
