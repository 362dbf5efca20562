"""rematerialize: with a backward, norms and gated activations keep no more than what they are made of.

On a CPU torch's RMS norm is several ops, and keeps the normalized values beside the input; a product with an
activation keeps that activation beside what it was computed from. Both are cheap to compute again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.autograd.function import once_differentiable

from passes.graphs import op_name
from passes.lowering.local_values import is_tensor, local

__all__ = ["gated", "rematerialize", "rms_norm"]

aten = torch.ops.aten

WORTH = 1 << 15
"""Elements of a value from which on memory is worth the microseconds of a function of one's own."""


class _RMSNorm(torch.autograd.Function):
    """A norm over the last dim that keeps its input."""

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
        of_x, of_weight = None, None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                of_weight = (grad * normed).reshape(-1, normed.shape[-1]).sum(0).to(weight.dtype)
            grad = grad * weight
        if ctx.needs_input_grad[0]:
            along = (grad * normed).mean(-1, keepdim=True)
            of_x = normed.mul_(along).neg_().add_(grad).mul_(scale).to(x.dtype)
        return of_x, of_weight, None


def rms_norm(x: torch.Tensor, shape: list[int], weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``torch.rms_norm`` over the last dim, whose backward computes the normalized values again."""
    # elsewhere than on a CPU it is one kernel, which does that
    if x.numel() >= WORTH and x.is_cpu and x.is_floating_point() and torch.is_grad_enabled():
        result: torch.Tensor = _RMSNorm.apply(x, weight, eps)
        return result
    return torch.rms_norm(x, shape, weight, eps)


class _Gated(torch.autograd.Function):
    """A product with an activation that keeps what the activation is of."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, approximate: str | None) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        ctx.approximate = approximate
        return _activated(x, approximate).mul_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, y), (grad,), approximate = ctx.saved_tensors, grads, ctx.approximate
        of_x, of_y = None, None
        if ctx.needs_input_grad[0]:
            inner = grad * y
            of_x = aten.silu_backward(inner, x) if approximate is None else aten.gelu_backward(
                inner, x, approximate=approximate
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            of_y = _activated(x, approximate).mul_(grad)
        return of_x, of_y, None


def _activated(x: torch.Tensor, approximate: str | None) -> torch.Tensor:
    return F.silu(x) if approximate is None else F.gelu(x, approximate=approximate)


def gated(x: torch.Tensor, y: torch.Tensor, approximate: str | None) -> torch.Tensor:
    """``silu(x) * y``, or with ``gelu``, whose backward computes the activation again.

    Args:
        x: a tensor.
        y: another one of its shape and dtype.
        approximate: ``gelu``'s; None: ``silu``.
    """
    if x.numel() >= WORTH and torch.is_grad_enabled():
        result: torch.Tensor = _Gated.apply(x, y, approximate)
        return result
    return _activated(x, approximate) * y


def _norm(node: fx.Node) -> bool:
    """Let a norm be a lean one."""
    if node.target is not aten.rms_norm.default or node.kwargs:
        return False
    x, shape, weight, eps = (*node.args, None, None)[:4]
    if len(shape) != 1 or not isinstance(eps, float):
        return False
    if weight is not None and local(weight).dtype != local(x).dtype:
        return False
    node.target, node.args = rms_norm, (x, shape, weight, eps)
    return True


def _gate(graph: fx.Graph, node: fx.Node) -> bool:
    """Let a product with an activation be a lean one."""
    if node.target is not aten.mul.Tensor or node.kwargs or not all(is_tensor(a) for a in node.args):
        return False
    for act, other in (node.args, node.args[::-1]):
        name = op_name(act)
        alike = local(act) == local(other) == local(node)
        if name not in ("aten.silu", "aten.gelu") or len(act.users) > 1 or act is other or not alike:
            continue
        approximate = act.kwargs.get("approximate", "none") if name == "aten.gelu" else None
        node.target, node.args = gated, (act.args[0], other, approximate)
        graph.erase_node(act)
        return True
    return False


def rematerialize(graph: fx.Graph) -> int:
    """Keep less for a backward.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        How many ops keep less.
    """
    return sum(_norm(node) or _gate(graph, node) for node in list(graph.nodes) if node.op == "call_function")
