"""shard_parameters: broadcast rank 0's parameters, and keep this rank's shards of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from autotp.distributed.mesh import Mesh
from autotp.utils.hashing import checksum
from autotp.weights.slicing import local_part, shards_of
from passes import Layout, Shards

__all__ = ["assign_shards", "broadcast_parameters", "set_data", "shard_parameters"]


def assign_shards(model: nn.Module, shards: Mapping[str, torch.Tensor]) -> None:
    """Give parameters and buffers other values by name; they stay the same objects."""
    tensors = named_tensors(model)
    for name, local in shards.items():
        _assign(model, tensors[name], local)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by their first names."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _assign(model: nn.Module, tensor: torch.Tensor, local: torch.Tensor) -> None:
    """Give a parameter or buffer another value, also where it is on the meta device."""
    if not tensor.is_meta:
        set_data(tensor, local)
        return
    attributes = dict(tensor.__dict__)
    new = nn.Parameter(local, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else local
    try:
        torch.utils.swap_tensors(tensor, new)
        tensor.__dict__.update(attributes)
    except RuntimeError:  # there are weak references to it
        new.__dict__.update(attributes)
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({n: new for n, t in tensors.items() if t is tensor})  # type: ignore[misc]


def broadcast_parameters(model: nn.Module, mesh: Mesh, loaded: Collection[str] = ()) -> int:
    """Overwrite parameters and buffers with rank 0's where they differ, and return the number of those.

    Args:
        model: the model.
        mesh: the ranks.
        loaded: the names of tensors that are loaded from a checkpoint; they are not compared.
    """
    tensors = {n: t for n, t in named_tensors(model).items() if n not in loaded}
    sums = mesh.gathered({name: checksum(t) for name, t in tensors.items()})
    differing = [name for name in tensors if any(rank_sums[name] != sums[0][name] for rank_sums in sums)]
    with torch.no_grad():
        for name in differing:
            data = tensors[name].detach()
            values = data.contiguous()
            mesh.broadcast(values)
            if values.data_ptr() != data.data_ptr():
                data.copy_(values)
    return len(differing)


def shard_parameters(
    model: nn.Module, layouts: Mapping[str, Layout], rank: int, device: torch.device | None, loaded: Collection[str]
) -> None:
    """Replace parameters and their gradients by this rank's shards of them.

    Args:
        model: the model.
        layouts: the split weights' layouts.
        rank: this rank.
        device: the device to move all tensors to; None: they stay on theirs.
        loaded: the names of parameters that were loaded as shards already.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shards, grad = shards_of(layouts, name), parameter.grad
            parameter.grad = None
            if name not in loaded:
                set_data(parameter, _own_shard(parameter.data, shards, rank, device))
            if grad is not None:
                parameter.grad = _own_shard(grad, shards, rank, device)
        for buffer in model.buffers() if device is not None else ():
            buffer.data = buffer.data.to(device)


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give a parameter or buffer other data, perhaps of another shape."""
    if tensor.shape != data.shape:  # earlier outputs keep alive a record of the shape, until the dtype changes
        other = torch.complex64 if data.dtype != torch.complex64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def _own_shard(
    tensor: torch.Tensor, shards: Mapping[int, Shards], rank: int, device: torch.device | None
) -> torch.Tensor:
    """A rank's shard of a tensor, without the rest of the tensor in its memory."""
    shard = local_part(tensor, shards, rank)
    if device is not None and shard.device != device:
        return shard.to(device)
    in_larger = shard.untyped_storage().nbytes() > 2 * shard.nbytes  # a view into a mapped file, for example
    return shard.clone() if shards or in_larger else shard
