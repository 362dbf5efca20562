"""merge: several Linears of one input become one product with their weights laid side by side.

The weights stay parameters of their own, with their names, gradients and optimizer state: they are views of one
memory, which a lowered graph has as an input more. ``side_by_side`` computes one product forward and, backward, one
for the input's gradient and one for all the weights', where three Linears take six and two sums.
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

__all__ = ["Product", "apart", "is_weight", "joined", "merge", "side_by_side"]

aten = torch.ops.aten


class Product(torch.autograd.Function):
    """``x @ weight.T + bias`` whose gradient goes to the parts that the weight and the bias are made of.

    With a group the gradient of ``x`` is summed over its ranks, while the parts' are computed.
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
        """The gradients of ``x`` and of the parts."""
        x, weight = ctx.saved_tensors
        grad, needed = grads[0], ctx.needs_input_grad
        of_parts: list[Any] = [None] * (len(needed) - 5)
        of_x, pending = None, None
        if needed[0]:  # under autocast the product was one of narrower numbers; sums are of what x is
            of_x = grad.matmul(weight.to(grad.dtype)).to(x.dtype)
            pending = ctx.group.start_all_reduce(of_x) if ctx.group is not None else None
        if any(needed[5 : 5 + ctx.count]):
            rows, given = grad.reshape(-1, grad.shape[-1]), x.to(grad.dtype).reshape(-1, x.shape[-1])
            of_parts[: ctx.count] = rows.t().mm(given).split(ctx.sizes)
        if any(needed[5 + ctx.count :]):
            of_bias = grad.sum(list(range(grad.dim() - 1))) if grad.dim() > 1 else grad
            of_parts[ctx.count :] = of_bias.split(ctx.sizes)
        return pending() if pending is not None else of_x, None, None, None, None, *of_parts


def side_by_side(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int, *parts: torch.Tensor
) -> torch.Tensor:
    """``x @ weight.T + bias`` whose gradient goes to the parts that the weight and the bias are made of.

    Args:
        x: ``(..., in)``.
        weight: ``(sum of out, in)``; the parts' memory, without their gradients.
        bias: ``(sum of out,)``, likewise, or None.
        count: how many weights there are.
        parts: the weights, ``(out, in)`` each, and then the biases, if there are any, ``(out,)`` each.

    Returns:
        ``(..., sum of out)``.
    """
    if torch.is_grad_enabled():
        result: torch.Tensor = Product.apply(x, weight, bias, None, count, *parts)
        return result
    return F.linear(x, weight, bias)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        ctx.sizes = [p.shape[0] for p in parts]
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *grads[0].split(ctx.sizes)


def joined(whole: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    """A tensor whose gradient goes to the parts that it is made of, one after another along the first dim.

    Args:
        whole: the parts' memory, without their gradients.
        parts: the parts.
    """
    result: torch.Tensor = _Joined.apply(whole, *parts)
    return result


def apart(graph: fx.Graph) -> None:
    """Make a plain product of each ``side_by_side``, on weights that are ``joined`` where the graph begins.

    What computes on them then has no inputs in one memory, as a compiler wants it of a region.

    Args:
        graph: a rank's graph; changed in place.
    """
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in graph.find_nodes(op="call_function", target=side_by_side):
        x, *wholes, count = node.args[:4]
        operands = [x]
        for whole, parts in zip(wholes, (node.args[4 : 4 + count], node.args[4 + count :]), strict=True):
            if whole is not None:
                operands.append(call(first, joined, (whole, *parts), like=parts[0], shape=local(whole).shape))
        replace(node, call(node, aten.linear.default, tuple(operands), like=node, shape=local(node).shape))


def is_weight(node: Any, dims: int) -> bool:
    """Whether an argument is one weight, with so many dims, none of them empty."""
    if not isinstance(node, fx.Node) or len(node.meta.get("weights", ())) != 1:
        return False
    return len(local(node).shape) == dims and all(isinstance(n, int) and n > 0 for n in local(node).shape)


def _kind(node: fx.Node) -> Any:
    """What Linears must have in common to be merged; None for one that cannot be."""
    if node.target is not aten.linear.default or not all(is_tensor(a) for a in node.args[:2]):
        return None
    x, weight, bias = (*node.args, None)[:3]
    if not is_weight(weight, 2) or not (bias is None or is_weight(bias, 1)):
        return None
    return x, local(weight).dtype, bias is not None


def _laid_out(weights: list[fx.Node], graph: fx.Graph) -> fx.Node:
    """An input more: the memory of weights that lie one after another."""
    names = tuple(n for w in weights for n in w.meta["weights"])
    for node in graph.find_nodes(op="placeholder"):
        if node.meta.get("weights") == names:
            return node
    rows = sum(int(local(w).shape[0]) for w in weights)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder("_and_".join(w.name for w in weights)[:80])
    whole = Local((rows, *local(weights[0]).shape[1:]), local(weights[0]).dtype)
    node.meta = {"weights": names, "grad": False, "local": whole}
    return node


def merge(graph: fx.Graph, grad: bool) -> int:
    """Merge Linears that have one input.

    A weight is merged once: one that several Linears use stays as it is, and so does one among two groups.

    Args:
        graph: a rank's graph whose weights are inputs (``meta["weights"]``: their names); changed in place.
        grad: whether a backward follows.

    Returns:
        How many products are gone.
    """
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and (kind := _kind(node)) is not None:
            groups[kind].append(node)
    taken: set[str] = set()
    count = 0
    for nodes in groups.values():
        names = [n for node in nodes for w in node.args[1:] if w is not None for n in w.meta["weights"]]
        if len(nodes) < 2 or len(set(names)) < len(names) or taken & set(names):
            continue
        taken |= set(names)
        count += len(nodes) - 1
        _merged(graph, nodes, grad)
    return count


def _merged(graph: fx.Graph, nodes: list[fx.Node], grad: bool) -> None:
    first = nodes[0]
    x, weights = first.args[0], [n.args[1] for n in nodes]
    biases = [n.args[2] for n in nodes if len(n.args) > 2 and n.args[2] is not None]
    sizes = [int(local(w).shape[0]) for w in weights]
    shape = (*local(first).shape[:-1], sum(sizes))
    weight, bias = _laid_out(weights, graph), _laid_out(biases, graph) if biases else None
    if grad:
        args: tuple[Any, ...] = (x, weight, bias, len(weights), *weights, *biases)
        product = call(first, side_by_side, args, like=first, shape=shape)
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
