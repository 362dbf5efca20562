"""merge: make one product of several Linears with one input, with their weights adjacent in memory.

The weights stay separate parameters, with their names, gradients and optimizer state. They are views of one memory,
which is an additional input of the lowered graph. ``merged_linear`` computes one product forward. Backward it computes
one for the input's gradient and one for all the weights'; three Linears take six products and two sums.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.autograd.function import once_differentiable

from passes.lowering.local_values import Local, call, is_tensor, local, replace
from passes.ops import context

__all__ = ["LinearFunction", "is_weight", "merge", "merged_linear", "split_gradient", "unmerge"]

aten = torch.ops.aten


class LinearFunction(torch.autograd.Function):
    """``x @ weight.T + bias``, with gradients for the parameters that the weight and the bias consist of.

    With a group, the gradient of ``x`` is summed over its ranks while the parameters' gradients are computed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, group: context.Communicator | None, count: int,
        *parts: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """See :func:`side_by_side`."""
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.count, ctx.sizes = group, count, [p.shape[0] for p in parts[:count]]
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients of ``x`` and of the parameters."""
        x, weight = ctx.saved_tensors
        grad, needed = grads[0], ctx.needs_input_grad
        of_parts: list[Any] = [None] * (len(needed) - 5)
        of_x, pending = None, None
        if needed[0]:  # under autocast the product was computed in a narrower dtype; the sum is in x's
            of_x = grad.matmul(weight.to(grad.dtype)).to(x.dtype)
            pending = ctx.group.start_all_reduce(of_x) if ctx.group is not None else None
        if any(needed[5 : 5 + ctx.count]):
            rows, inputs = grad.reshape(-1, grad.shape[-1]), x.to(grad.dtype).reshape(-1, x.shape[-1])
            of_parts[: ctx.count] = rows.t().mm(inputs).split(ctx.sizes)
        if any(needed[5 + ctx.count :]):
            of_bias = grad.sum(list(range(grad.dim() - 1))) if grad.dim() > 1 else grad
            of_parts[ctx.count :] = of_bias.split(ctx.sizes)
        return pending() if pending is not None else of_x, None, None, None, None, *of_parts


def merged_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int, *parts: torch.Tensor
) -> torch.Tensor:
    """``x @ weight.T + bias``, with gradients for the parameters that the weight and the bias consist of.

    Args:
        x: ``(..., in)``.
        weight: ``(sum of out, in)``; the memory of the separate weights, which gets no gradient.
        bias: ``(sum of out,)``; the memory of the separate biases, or None.
        count: the number of weights.
        parts: the weights, ``(out, in)`` each, and then the biases, if there are any, ``(out,)`` each.

    Returns:
        ``(..., sum of out)``.
    """
    if torch.is_grad_enabled():
        result: torch.Tensor = LinearFunction.apply(x, weight, bias, None, count, *parts)
        return result
    return F.linear(x, weight, bias)


class _SplitGradient(torch.autograd.Function):
    """A view of the memory of several parts; the backward splits the gradient among them."""

    @staticmethod
    def forward(ctx: Any, memory: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        ctx.sizes = [p.shape[0] for p in parts]
        return memory.view_as(memory)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *grads[0].split(ctx.sizes)


def split_gradient(memory: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    """A concatenation along the first dim, whose gradient is split among its parts.

    Args:
        memory: the memory of the parts, which gets no gradient.
        parts: the parts, which are views of it, one after another.
    """
    result: torch.Tensor = _SplitGradient.apply(memory, *parts)
    return result


def unmerge(graph: fx.Graph) -> None:
    """Make a Linear of each ``merged_linear``, on weights that ``split_gradient`` makes where the graph begins.

    The Linears then have no two inputs in one memory, as a compiler demands of a region.

    Args:
        graph: a rank's graph; changed in place.
    """
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in graph.find_nodes(op="call_function", target=merged_linear):
        x, *memories, count = node.args[:4]
        operands = [x]
        for memory, parts in zip(memories, (node.args[4 : 4 + count], node.args[4 + count :]), strict=True):
            if memory is not None:
                args = (memory, *parts)
                operands.append(call(first, split_gradient, args, like=parts[0], shape=local(memory).shape))
        replace(node, call(node, aten.linear.default, tuple(operands), like=node, shape=local(node).shape))


def is_weight(node: Any, dims: int) -> bool:
    """Whether an argument is a single weight with this number of dims, none of them empty."""
    if not isinstance(node, fx.Node) or len(node.meta.get("weights", ())) != 1:
        return False
    return len(local(node).shape) == dims and all(isinstance(n, int) and n > 0 for n in local(node).shape)


def _merge_key(node: fx.Node) -> Any:
    """The key of a Linear, which is equal for those that can be merged; None for one that cannot be."""
    if node.target is not aten.linear.default or not all(is_tensor(a) for a in node.args[:2]):
        return None
    x, weight, bias = (*node.args, None)[:3]
    if not is_weight(weight, 2) or not (bias is None or is_weight(bias, 1)):
        return None
    return x, local(weight).dtype, bias is not None


def _joint_input(weights: list[fx.Node], graph: fx.Graph) -> fx.Node:
    """The graph's input for the memory of these weights, one after another; made if there is none yet."""
    names = tuple(n for w in weights for n in w.meta["weights"])
    for node in graph.find_nodes(op="placeholder"):
        if node.meta.get("weights") == names:
            return node
    rows = sum(int(local(w).shape[0]) for w in weights)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder("_and_".join(w.name for w in weights)[:80])
    value = Local((rows, *local(weights[0]).shape[1:]), local(weights[0]).dtype)
    node.meta = {"weights": names, "grad": False, "local": value}
    return node


def merge(graph: fx.Graph, grad: bool) -> int:
    """Merge Linears that have one input.

    A weight can be in one group only: Linears that share a weight stay as they are, and so does a second group with it.

    Args:
        graph: a rank's graph whose weights are inputs (``meta["weights"]``: their names); changed in place.
        grad: whether a backward follows.

    Returns:
        The number of products that were saved.
    """
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and (kind := _merge_key(node)) is not None:
            groups[kind].append(node)
    taken: set[str] = set()
    count = 0
    for nodes in groups.values():
        names = [n for node in nodes for w in node.args[1:] if w is not None for n in w.meta["weights"]]
        if len(nodes) < 2 or len(set(names)) < len(names) or taken & set(names):
            continue
        taken |= set(names)
        count += len(nodes) - 1
        _merge(graph, nodes, grad)
    return count


def _merge(graph: fx.Graph, nodes: list[fx.Node], grad: bool) -> None:
    """Make one product of these Linears, and slices of it in their place."""
    first = nodes[0]
    x, weights = first.args[0], [n.args[1] for n in nodes]
    biases = [n.args[2] for n in nodes if len(n.args) > 2 and n.args[2] is not None]
    sizes = [int(local(w).shape[0]) for w in weights]
    shape = (*local(first).shape[:-1], sum(sizes))
    weight, bias = _joint_input(weights, graph), _joint_input(biases, graph) if biases else None
    if grad:
        args: tuple[Any, ...] = (x, weight, bias, len(weights), *weights, *biases)
        product = call(first, merged_linear, args, like=first, shape=shape)
    else:
        args = (x, weight) if bias is None else (x, weight, bias)
        product = call(first, aten.linear.default, args, like=first, shape=shape)
    start, dim, parts = 0, len(shape) - 1, []
    for node, size in zip(nodes, sizes, strict=True):
        args = (product, dim, start, start + size)
        parts.append(call(first, aten.slice.Tensor, args, like=node, shape=local(node).shape, name=f"{node.name}_part"))
        start += size
    for node, part in zip(nodes, parts, strict=True):
        replace(node, part)
