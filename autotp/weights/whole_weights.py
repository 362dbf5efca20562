"""whole_weights: a module's parameters are dense for a time, so that its own code may read and change them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from autotp.weights.shard_parameters import set_data
from autotp.weights.slicing import local_part
from passes import Shards

__all__ = ["whole_weights"]


@contextlib.contextmanager
def whole_weights(
    module: nn.Module,
    shards: Callable[[str], Mapping[int, Shards]],
    whole: Callable[[str, torch.Tensor], torch.Tensor],
    rank: int,
) -> Iterator[None]:
    """Let a module's split parameters be dense in this context; afterwards they are shards of what they are then.

    Parameters stay the same objects, with the same memory, also where the code has put others in their place.

    Args:
        module: the module.
        shards: returns the split dims of a parameter, by its name in the module.
        whole: returns the dense tensor of a parameter, by that name and by this rank's shard. Collective.
        rank: this rank.
    """
    split = {name: p for name, p in module.named_parameters() if shards(name)}
    locals_ = {name: p.data for name, p in split.items()}
    gradients = {name: p.grad for name, p in split.items()}
    dense = {name: whole(name, p) for name, p in split.items()}
    for name, parameter in split.items():
        parameter.grad = None
        set_data(parameter, dense[name])
    try:
        yield
    finally:
        now = dict(module.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, parameter in split.items():
                local, found = locals_[name], now.get(name, parameter)
                part = local_part(found.data, shards(name), rank)
                if part.dtype == local.dtype and part.device == local.device:
                    local.copy_(part)
                else:
                    local = part.clone()
                set_data(parameter, local)
                parameter.grad = gradients[name]
                if found is not parameter:
                    parameter.requires_grad_(found.requires_grad)
                    _put_back(module, found, parameter)


def _put_back(module: nn.Module, new: nn.Parameter, parameter: nn.Parameter) -> None:
    for inner in module.modules():
        inner._parameters.update({k: parameter for k, p in inner._parameters.items() if p is new})
