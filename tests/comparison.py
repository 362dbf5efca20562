"""Comparing a dense model with its parallelized form, on one rank or many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

import autotp
from autotp.verification.measure import relative_error
from tests.models import Scaled


def outputs(result: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def storages(model: Any) -> list[Any]:
    return [p.untyped_storage() for p in model.parameters()]


def backward(values: list[torch.Tensor]) -> None:
    """A backward from every output with fixed weights."""
    roots = [v for v in values if v.requires_grad]
    weights = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view(v.shape).cos() for v in roots]
    torch.autograd.backward(roots, weights)


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def apart(dense: nn.Module, model: nn.Module, **kwargs: Any) -> float:
    """The largest relative error of an output."""
    pairs = zip(outputs(dense(**kwargs)), outputs(model(**kwargs)), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


def gradients_apart(dense: nn.Module, model: nn.Module) -> float:
    found = autotp.full_gradients(model)
    largest = max(float(p.grad.abs().max()) for p in dense.parameters() if p.grad is not None)
    return max(
        relative_error(p.grad, found[n], 1e-6 * largest) for n, p in dense.named_parameters() if p.grad is not None
    )


def same(value: torch.Tensor) -> bool:
    """Whether a tensor has the same bits on all ranks."""
    every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(every, value.detach().contiguous())
    return all(torch.equal(value, other) for other in every)


def scaled(world: int, **options: Any) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    dense, model = Scaled().double().eval(), Scaled().double().eval()
    x = torch.randn(3, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return dense, autotp.parallelize(model, world, example_inputs=(x,), **options), x
