"""rematerialize: let norms and gated activations save only their inputs for the backward.

On a CPU torch's RMS norm is several ops, and saves the normalized values beside its input. A product with an activation
saves the activation beside the activation's input. Both are cheap to compute again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.autograd.function import once_differentiable

from passes.graphs import op_name
from passes.lowering.local_values import is_tensor, local

__all__ = ["gated_activation", "rematerialize", "rms_norm"]

aten = torch.ops.aten

WORTH = 1 << 15
"""The fewest elements of a value whose memory is worth the microseconds of an autograd function in Python."""


class _RMSNorm(torch.autograd.Function):
    """An RMS norm over the last dim that saves only its input and its weight for the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return torch.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        grad, x_wide = grads[0].to(wide), x.to(wide)
        scale = x_wide.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()
        normed = x_wide * scale
        x_grad, weight_grad = None, None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                weight_grad = (grad * normed).reshape(-1, normed.shape[-1]).sum(0).to(weight.dtype)
            grad = grad * weight
        if ctx.needs_input_grad[0]:
            along = (grad * normed).mean(-1, keepdim=True)
            x_grad = normed.mul_(along).neg_().add_(grad).mul_(scale).to(x.dtype)
        return x_grad, weight_grad, None


def rms_norm(x: torch.Tensor, shape: list[int], weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``torch.rms_norm`` over the last dim, whose backward computes the normalized values again."""
    # on other devices than a CPU it is one kernel, which does so itself
    if x.numel() >= WORTH and x.is_cpu and x.is_floating_point() and torch.is_grad_enabled():
        result: torch.Tensor = _RMSNorm.apply(x, weight, eps)
        return result
    return torch.rms_norm(x, shape, weight, eps)


class _GatedActivation(torch.autograd.Function):
    """A product with an activation that saves the activation's input for the backward, not the activation."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, approximate: str | None) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        ctx.approximate = approximate
        return _activate(x, approximate).mul_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, y), (grad,), approximate = ctx.saved_tensors, grads, ctx.approximate
        x_grad, y_grad = None, None
        if ctx.needs_input_grad[0]:
            inner = grad * y
            x_grad = aten.silu_backward(inner, x) if approximate is None else aten.gelu_backward(
                inner, x, approximate=approximate
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            y_grad = _activate(x, approximate).mul_(grad)
        return x_grad, y_grad, None


def _activate(x: torch.Tensor, approximate: str | None) -> torch.Tensor:
    """``silu``, or ``gelu`` with this approximation."""
    return F.silu(x) if approximate is None else F.gelu(x, approximate=approximate)


def gated_activation(x: torch.Tensor, y: torch.Tensor, approximate: str | None) -> torch.Tensor:
    """``silu(x) * y``, or with ``gelu``, whose backward computes the activation again.

    Args:
        x: a tensor.
        y: a tensor of the same shape and dtype.
        approximate: the argument of ``gelu``; None for ``silu``.
    """
    if x.numel() >= WORTH and torch.is_grad_enabled():
        result: torch.Tensor = _GatedActivation.apply(x, y, approximate)
        return result
    return _activate(x, approximate) * y


def _replace_norm(node: fx.Node) -> bool:
    """Call ``rms_norm`` of this file in place of torch's; returns whether the node is such a norm."""
    if node.target is not aten.rms_norm.default or node.kwargs:
        return False
    x, shape, weight, eps = (*node.args, None, None)[:4]
    if len(shape) != 1 or not isinstance(eps, float):
        return False
    if weight is not None and local(weight).dtype != local(x).dtype:
        return False
    node.target, node.args = rms_norm, (x, shape, weight, eps)
    return True


def _replace_gate(graph: fx.Graph, node: fx.Node) -> bool:
    """Call ``gated_activation`` in place of a product with an activation; returns whether the node is one."""
    if node.target is not aten.mul.Tensor or node.kwargs or not all(is_tensor(a) for a in node.args):
        return False
    for act, other in (node.args, node.args[::-1]):
        name = op_name(act)
        same = local(act) == local(other) == local(node)
        if name not in ("aten.silu", "aten.gelu") or len(act.users) > 1 or act is other or not same:
            continue
        approximate = act.kwargs.get("approximate", "none") if name == "aten.gelu" else None
        node.target, node.args = gated_activation, (act.args[0], other, approximate)
        graph.erase_node(act)
        return True
    return False


def rematerialize(graph: fx.Graph) -> int:
    """Let norms and gated activations save only their inputs for the backward.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        The number of ops that save less.
    """
    return sum(
        _replace_norm(node) or _replace_gate(graph, node) for node in list(graph.nodes) if node.op == "call_function"
    )
