"""norms: norms over split features, with one small collective in forward and one in backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from passes.ops import context

__all__ = ["norm_over_shards"]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, counts: Sequence[int], centered: bool,
        group: context.Communicator,
    ) -> torch.Tensor:  # fmt: skip
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = sum(counts)
        mean = wide.mean(-1) if centered else wide.new_zeros(x.shape[:-1])
        own = torch.stack([mean, (wide - mean.unsqueeze(-1)).square().sum(-1)])
        gathered = torch.stack(group.all_gather(own, [own.shape] * group.size), dim=1)
        count = torch.tensor(counts, dtype=wide.dtype, device=x.device).view(-1, *[1] * mean.dim())
        squares = gathered[1] * (count > 0)
        mean = (gathered[0] * count).sum(0) / size
        square = (squares + count * (gathered[0] - mean).square()).sum(0) / size
        scale = (square + eps).rsqrt().unsqueeze(-1)
        normal = (wide - mean.unsqueeze(-1)) * scale
        ctx.save_for_backward(normal, scale, weight)
        ctx.group, ctx.size, ctx.centered, ctx.counted = group, size, centered, counts[group.rank] > 0
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        y = normal if weight is None else normal * weight
        return (y if bias is None else y + bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        normal, scale, weight = ctx.saved_tensors
        of_result = grads[0].to(normal.dtype)
        grad = of_result if weight is None else of_result * weight
        sums = ctx.group.all_reduce(torch.stack([grad.sum(-1), (grad * normal).sum(-1)])).unsqueeze(-1) / ctx.size
        if ctx.counted:  # among ranks that hold the same features only one subtracts the term of the sums
            grad = grad - normal * sums[1] - (sums[0] if ctx.centered else 0.0)
        rows = list(range(of_result.dim() - 1))
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        of_weight = None if weight_dtype is None else (of_result * normal).sum(rows).to(weight_dtype)
        of_bias = None if bias_dtype is None else of_result.sum(rows).to(bias_dtype)
        return (grad * scale).to(x_dtype), of_weight, of_bias, None, None, None, None


def norm_over_shards(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    counts: Sequence[int],
    centered: bool,
    group: str,
) -> torch.Tensor:
    """V -> V: layer or RMS norm over a last dim that is split.

    The ranks exchange, per row, their features' mean and sum of squared deviations. Those of all features follow
    without cancellation (Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample
    variances, 1979).

    Args:
        x: ``(..., local features)``.
        weight: ``(local features,)``, or None.
        bias: ``(local features,)``, or None.
        eps: the number added to the variance; torch's default for None.
        counts: the number of features that each rank contributes; 0 if another rank holds the same ones.
        centered: whether the mean is subtracted (layer norm).
        group: the group's name.
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _Norm.apply(x, weight, bias, eps, tuple(counts), centered, context.current().group(group))
