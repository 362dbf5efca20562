"""shard_parameters: rank 0's parameters go to all ranks, each of which keeps its shard."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from autotp.distributed.mesh import Mesh
from autotp.utils.hashing import checksum
from autotp.weights.slicing import local_part, shards_of
from passes import Layout, Shards

__all__ = ["assign_shards", "broadcast_parameters", "shard_parameters"]


def assign_shards(model: nn.Module, made: Mapping[str, torch.Tensor]) -> None:
    """Let parameters and buffers have other memory, and stay the objects that they are."""
    tensors = named_tensors(model)
    for name, local in made.items():
        _become(model, tensors[name], local)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each by its first name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _become(model: nn.Module, tensor: torch.Tensor, local: torch.Tensor) -> None:
    if not tensor.is_meta:
        _hold(tensor, local)
        return
    attributes = dict(tensor.__dict__)
    made = nn.Parameter(local, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else local
    try:
        torch.utils.swap_tensors(tensor, made)
        tensor.__dict__.update(attributes)
    except RuntimeError:  # there are weak references to it
        made.__dict__.update(attributes)
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                held.update({n: made for n, t in held.items() if t is tensor})  # type: ignore[misc]


def broadcast_parameters(model: nn.Module, mesh: Mesh, loaded: Collection[str] = ()) -> int:
    """Overwrite parameters and buffers by rank 0's where they differ; how many did.

    Args:
        model: the model.
        mesh: the ranks.
        loaded: the names of those that come from a checkpoint, at which nobody looks.
    """
    tensors = {n: t for n, t in named_tensors(model).items() if n not in loaded}
    sums = mesh.gathered({name: checksum(t) for name, t in tensors.items()})
    differing = [name for name in tensors if any(each[name] != sums[0][name] for each in sums)]
    with torch.no_grad():
        for name in differing:
            data = tensors[name].detach()
            whole = data.contiguous()
            mesh.broadcast(whole)
            if whole.data_ptr() != data.data_ptr():
                data.copy_(whole)
    return len(differing)


def shard_parameters(
    model: nn.Module, layouts: Mapping[str, Layout], rank: int, device: torch.device | None, loaded: Collection[str]
) -> None:
    """Let parameters and their gradients be this rank's shares of what they are.

    Args:
        model: the model.
        layouts: the split weights' layouts.
        rank: this rank.
        device: where all tensors go; None: they stay where they are.
        loaded: what has been loaded, and is this rank's share already.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shards, grad = shards_of(layouts, name), parameter.grad
            parameter.grad = None
            if name not in loaded:
                _hold(parameter, _own(parameter.data, shards, rank, device))
            if grad is not None:
                parameter.grad = _own(grad, shards, rank, device)
        for buffer in model.buffers() if device is not None else ():
            buffer.data = buffer.data.to(device)


def _hold(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Let a parameter or buffer have other data, perhaps of another shape."""
    if tensor.shape != data.shape:  # outputs of before keep what remembers the shape, until the dtype changes
        other = torch.complex64 if data.dtype != torch.complex64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def _own(whole: torch.Tensor, shards: Mapping[int, Shards], rank: int, device: torch.device | None) -> torch.Tensor:
    """A rank's share of a tensor, which keeps nothing else in memory."""
    part = local_part(whole, shards, rank)
    if device is not None and part.device != device:
        return part.to(device)
    larger = part.untyped_storage().nbytes() > 2 * part.nbytes  # part of a mapped file, say
    return part.clone() if shards or larger else part
