"""reuse: without a backward, write results over operands that nothing reads any more."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes import ops
from passes.graphs import op_name
from passes.lowering.local_values import is_tensor, local

__all__ = ["reuse"]

aten = torch.ops.aten

_IN_PLACE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.silu.default: aten.silu_.default,
    aten.relu.default: aten.relu_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.neg.default: aten.neg_.default,
    aten.exp.default: aten.exp_.default,
    aten.rsqrt.default: aten.rsqrt_.default,
    ops.all_reduce: ops.all_reduce_,
    ops.start_all_reduce: ops.start_all_reduce_,
}
_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}
_ALLOCATING = {"aten.linear", "aten.matmul", "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.add",
               "aten.sub", "aten.mul", "aten.div", "aten.silu", "aten.gelu", "aten.relu", "aten.tanh", "aten.sigmoid",
               "aten.neg", "aten.exp", "aten.rsqrt", "aten.pow", "aten.mean", "aten.rms_norm", "aten.layer_norm",
               "aten.cat", "aten.scaled_dot_product_attention", "aten.embedding", "all_reduce", "all_gather", "wait",
               "vocab_parallel_embedding"}  # fmt: skip
"""Ops whose results have their own memory."""


def _owns_memory(node: fx.Node) -> bool:
    """Whether a node's result is in memory that an op has allocated."""
    # an in-place op has its operand's memory, which an op has allocated, too
    return op_name(node).removesuffix("_") in _ALLOCATING


def _may_overwrite(operand: Any, node: fx.Node) -> bool:
    """Whether a node may write over an operand: an op has allocated it, and only this node reads it, once."""
    return (
        is_tensor(operand)
        and operand.op == "call_function"
        and _owns_memory(operand)
        and len(operand.users) == 1
        and list(node.args).count(operand) == 1
        and local(operand) == local(node)
    )


def reuse(graph: fx.Graph) -> int:
    """Write results over operands that nothing reads any more, as in all-reduces, residual sums and activations.

    Only for a graph that no backward follows.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        The number of results that take no new memory.
    """
    count = 0
    for node in graph.nodes:
        target = _IN_PLACE.get(node.target) if node.op == "call_function" else None
        if target is None or not node.args:
            continue
        if (
            node.target in _COMMUTATIVE
            and not node.kwargs
            and not _may_overwrite(node.args[0], node)
            and len(node.args) == 2
        ):
            node.args = node.args[::-1] if _may_overwrite(node.args[1], node) else node.args
        if _may_overwrite(node.args[0], node):
            node.target = target
            count += 1
    return count
