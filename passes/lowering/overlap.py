"""overlap: run computation beside an all-reduce whose result it does not need."""

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
from passes.lowering.merge import LinearFunction, is_weight, merged_linear
from passes.ops import context

__all__ = ["enter_linear", "overlap"]

aten = torch.ops.aten


def enter_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: str, count: int, *parts: torch.Tensor
) -> torch.Tensor:
    """:func:`passes.ops.enter` and :func:`passes.lowering.merge.merged_linear` in one op.

    Backward, the input's gradient is summed over the ranks while the weights' gradients are computed, as in
    Megatron-LM (its ``LinearWithGradAccumulationAndAsyncCommunication``).

    Args:
        x: ``(..., in)``, replicated.
        weight: ``(sum of out, in)``; the memory of the separate weights, which gets no gradient.
        bias: ``(sum of out,)``; the memory of the separate biases, or None.
        group: the group over which the input's gradient is summed.
        count: the number of weights.
        parts: the weights, ``(out, in)`` each, and then the biases, if there are any, ``(out,)`` each.

    Returns:
        ``(..., sum of out)``.
    """
    if torch.is_grad_enabled():
        result: torch.Tensor = LinearFunction.apply(x, weight, bias, context.current().group(group), count, *parts)
        return result
    return F.linear(x, weight, bias)


_VIEWS = {"aten.slice", "aten.transpose", "aten.permute", "aten.view", "aten.unsqueeze", "aten.squeeze", "aten.select",
          "aten.expand", "aten.sym_size", "getitem"}  # fmt: skip


def _can_move(node: fx.Node) -> bool:
    """Whether a node only computes a value from others; no node is moved past one that does more."""
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return node.op in ("placeholder", "get_attr") or getattr(node.target, "__module__", None) == operator.add.__module__


def _any_computation(nodes: Sequence[fx.Node]) -> bool:
    """Whether any of the nodes computes something, rather than taking a view."""
    return any(n.op == "call_function" and op_name(n) not in _VIEWS for n in nodes)


def _overlap_forward(graph: fx.Graph) -> int:
    """Split each all-reduce into a start and a wait, and move independent nodes between the two.

    A node is independent if the all-reduce does not need its value, and it does not need the all-reduce's. It is moved
    only if it lies between the nearest nodes on both sides that must not be moved.

    Returns:
        The number of all-reduces with computation beside them.
    """
    nodes = [n for n in graph.nodes if n.op != "output"]
    bounds = [-1, *(i for i, n in enumerate(nodes) if not _can_move(n)), len(nodes)]
    moved: set[fx.Node] = set()  # a node between two all-reduces goes with the first one
    count = 0
    for before, at, after in zip(bounds, bounds[1:], bounds[2:], strict=False):
        reduction, early, late = nodes[at], nodes[before + 1 : at], nodes[at + 1 : after]
        if reduction.target is not ops.all_reduce:
            continue
        sources, dependents = {reduction}, {reduction}
        for node in reversed(early):
            if not sources.isdisjoint(node.users):
                sources.add(node)
        for node in late:
            if not dependents.isdisjoint(node.all_input_nodes):
                dependents.add(node)
        window = [n for n in early if n not in sources and n not in moved and n.op != "placeholder"]
        window += [n for n in late if n not in dependents]
        if not _any_computation(window):
            continue
        moved.update(window)
        shape = local(reduction).shape
        last = start = call(reduction, ops.start_all_reduce, reduction.args, like=reduction, shape=shape)
        for node in window:
            last.append(node)
            last = node
        replace(reduction, call(reduction, ops.wait, (start,), like=reduction, shape=shape))
        count += 1
    return count


def _linear_arguments(node: fx.Node) -> Sequence[Any] | None:
    """The arguments of ``merged_linear`` after the input, for a Linear or a merged one; None for another node."""
    if node.target is merged_linear:
        return node.args[1:]
    if node.target is not aten.linear.default or node.kwargs:
        return None
    weight, bias = (*node.args[1:], None)[:2]
    if not is_weight(weight, 2) or not (bias is None or is_weight(bias, 1)):
        return None
    return weight, bias, 1, weight, *([] if bias is None else [bias])


def _overlap_backward(graph: fx.Graph) -> int:
    """Make one op of each ``enter`` and the only Linear that reads it; returns how many there are."""
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=ops.enter)):
        x, group = node.args
        if not is_tensor(x) or len(node.users) != 1:
            continue
        (linear,) = node.users
        if linear.args[0] is not node or (parts := _linear_arguments(linear)) is None:
            continue
        weight, bias, number, *weights = parts
        args = (x, weight, bias, group, number, *weights)
        replace(linear, call(linear, enter_linear, args, like=linear, shape=local(linear).shape))
        graph.erase_node(node)
        count += 1
    return count


def overlap(graph: fx.Graph, grad: bool) -> int:
    """Let ranks compute while an all-reduce is under way.

    Without a backward, an all-reduce starts as early as it can, and is waited for after the computation that does not
    need it. With a backward, the all-reduce of an input's gradient runs beside the products for the weights' gradients.

    Args:
        graph: a rank's graph; changed in place.
        grad: whether a backward follows.

    Returns:
        The number of all-reduces with computation beside them.
    """
    return _overlap_backward(graph) if grad else _overlap_forward(graph)
