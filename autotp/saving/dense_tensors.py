"""dense_tensors: the tensors of the dense model, as this rank's state dict describes them."""

from __future__ import annotations

import torch
from torch import nn

from autotp.errors import WeightsError
from autotp.saving.weight_file import DenseTensor
from autotp.utils.value_types import DTENSOR, is_a
from autotp.weights.shard_tensor import ShardTensor

__all__ = ["dense_tensors"]


def dense_tensors(model: nn.Module) -> list[DenseTensor]:
    """The tensors of the dense model's state dict, under their own names.

    Raises:
        WeightsError: one of them cannot be saved without a gather, or is no tensor.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise WeightsError(f"{name} in the state dict is a {type(tensor).__name__}: only tensors can be saved")
        if is_a(tensor, DTENSOR):
            raise WeightsError(
                f"{name} is split further, by FSDP2: write autotp.full_state_dict(model, rank=0), which joins it"
            )
    return [DenseTensor(name, name, dense_shape_of(tensor), tensor.dtype) for name, tensor in state.items()]


def dense_shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the dense tensor that a value of a state dict is, or is a shard of."""
    return tuple(tensor.sharding.dense_shape(tensor.shape) if isinstance(tensor, ShardTensor) else tensor.shape)
