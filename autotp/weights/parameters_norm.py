"""parameters_norm: the norm of a dense model's parameters, where each rank holds shards of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from autotp.errors import AutoTPError
from autotp.utils.value_types import DTENSOR, is_a
from autotp.weights.grad_norm import as_list, by_model, compare, gathered

__all__ = ["parameters_norm"]


def parameters_norm(
    model_or_parameters: nn.Module | torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2.0
) -> torch.Tensor:
    """The norm of all elements of a model's parameters together, for a penalty on large weights in the loss.

    After ``autotp.parallelize`` a rank's parameters hold only its shards, so that a norm that is computed from them is
    that of a part. This function gives the norm of the whole model, as it was before. Each element counts once, also
    where several ranks hold it and where two modules share a parameter. The result has the same bits on every rank. Its
    gradient with respect to a rank's shard is the shard of the gradient that the whole parameter would have.

    It is collective: all ranks must call it, with the same parameters. Its backward is not.

    Args:
        model_or_parameters: a model, parallelized or not, or a part of one; or some of its parameters. Tensors that are
            computed from parameters (``p * mask``) are not recognized as shards.
        norm_type: the exponent p of ``(|x_1|^p + |x_2|^p + ...)^(1/p)``: a positive number, or ``inf`` for the largest
            absolute value. The gradient for ``inf`` goes in equal parts to the elements that have the largest value.
            Where an element is 0, its gradient is 0, too.

    Returns:
        A tensor of shape ``()`` on the first parameter's device, in the dtype to which the parameters' dtypes promote.
        Without parameters it is 0. A backward with ``create_graph=True`` is an error if there are shards among them.

    Raises:
        MismatchError: the ranks pass different parameters or exponents. All ranks raise, and none waits for another.
        AutoTPError: the exponent is not positive, or there are DTensors beside shards.

    Example:
        >>> model = autotp.parallelize(model, tp=4)
        >>> loss = criterion(model(x), y) + 1e-2 * autotp.parameters_norm(model) ** 2
        >>> loss.backward()
    """
    given = model_or_parameters.parameters() if isinstance(model_or_parameters, nn.Module) else model_or_parameters
    tensors, power = list({id(t): t for t in as_list(given)}.values()), float(norm_type)
    models = by_model(tensors)
    for model, entries in models:
        details = {"norm_type": str(power), "parameters": str([name for _, name, _ in entries])}
        compare(model, "parameters_norm", details)
    if not power > 0:
        raise AutoTPError(
            f"norm_type must be a positive number or inf, not {power:g}: use norm_type=2.0, or compute what you need "
            "from autotp.full_state_dict(model)"
        )
    if not models:
        return _norm([torch.linalg.vector_norm(t, power) for t in tensors], power) if tensors else torch.tensor(0.0)
    if any(is_a(t, DTENSOR) for t in tensors):
        raise AutoTPError("one norm over DTensors and a parallelized model's shards: take a norm of each, and combine")
    norm: torch.Tensor = _ParametersNorm.apply(power, models, *tensors)
    return norm


def _norm(norms: Sequence[torch.Tensor], power: float) -> torch.Tensor:
    """The norm of tensors from the norm of each."""
    dtype, device = functools.reduce(torch.promote_types, [n.dtype for n in norms]), norms[0].device
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([n.to(device, dtype) for n in norms]), power)
    return norm


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    return torch.promote_types(dtype, torch.float32)


class _ParametersNorm(torch.autograd.Function):
    """The norm, with collectives; the gradient of a shard then needs only the norm and the shard."""

    @staticmethod
    def forward(ctx: Any, power: float, models: Any, *tensors: torch.Tensor) -> torch.Tensor:
        dtype, device = functools.reduce(torch.promote_types, [t.dtype.to_real() for t in tensors]), tensors[0].device

        def norm(operands: list[torch.Tensor]) -> torch.Tensor:
            norms = [torch.linalg.vector_norm(t, power, dtype=_precise(t.dtype)) for t in operands if t.numel()]
            return (_norm(norms, power) if norms else torch.zeros(())).to(device, _precise(dtype))

        def largest(operands: list[torch.Tensor]) -> torch.Tensor:
            counts = [(t.abs() == total.to(t.device)).sum().to(total) for t in operands]
            return torch.stack(counts).sum() if counts else torch.zeros_like(total)

        total = _norm(gathered(models, tensors, norm), power)
        count = torch.stack(gathered(models, tensors, largest)).sum() if math.isinf(power) else None
        result = total.to(dtype)
        ctx.power = power
        ctx.save_for_backward(total, count, *tensors)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise AutoTPError(
                "a second derivative of autotp.parameters_norm: a backward with create_graph=True must leave it out. "
                "Add the norm to another loss, with a backward of its own"
            )
        total, count, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *[
                _gradient(t, gradient, total, count, ctx.power) if n else None
                for t, n in zip(tensors, needed, strict=True)
            ],
        )


def _gradient(
    tensor: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor, count: torch.Tensor | None, power: float
) -> torch.Tensor:
    """The gradient of a tensor or shard, from that of the norm, the norm, and how many elements are as large as it."""
    x = tensor.to(_precise(tensor.dtype))
    gradient, total = gradient.to(x.device, total.dtype), total.to(x.device)
    if count is not None:
        result = x.sgn() * (x.abs() == total) / count.to(x.device)
    elif power == 2:
        result = x / total
    else:
        result = x.sgn() * (x.abs() / total).pow(power - 1)
    return (result.masked_fill(x == 0, 0) * gradient).to(tensor.dtype)
