"""state_dict: the values of a parallelized model's state dict know of which dense tensor they are shards."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from autotp.weights.load_state_dict import Split
from autotp.weights.shard_tensor import Owner, Sharding, ShardTensor

__all__ = ["forget_marks", "mark_shards", "marked"]


def mark_shards(model: nn.Module, shards: Split, rank: int, owner: Owner) -> None:
    """Let the split tensors in state dicts of a model, of its modules and of modules around it be ShardTensors.

    They share memory with the parameters and have the shards' shapes, as before. Unsplit tensors stay what they are.

    Args:
        model: the parallelized model.
        shards: returns the split dims of a parameter or buffer.
        rank: this rank.
        owner: gathers the dense tensors of which the ranks hold shards.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if module._parameters or module._buffers:
            module.register_state_dict_post_hook(_MarkShards(f"{name}." if name else "", shards, rank, owner))


def forget_marks(model: nn.Module) -> None:
    """Undo :func:`mark_shards`."""
    for module in model.modules():
        hooks = module._state_dict_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, _MarkShards)]:
            del hooks[key]


def marked(tensor: torch.Tensor, split: Any, rank: int, owner: weakref.ref[Owner] | None) -> torch.Tensor:
    """A tensor as a ShardTensor; the tensor itself if no dim of it is split."""
    ((dim, shards),) = split.items() if split else ((0, None),)
    return tensor if shards is None else ShardTensor.of(tensor, Sharding(rank, dim, shards), owner)


class _MarkShards:
    """The state dict hook of a module that holds shards, or may hold some later."""

    def __init__(self, path: str, shards: Split, rank: int, owner: Owner) -> None:
        self.path, self.shards, self.rank, self.owner = path, shards, rank, owner

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for name in (*module._parameters, *module._buffers):
            tensor = state.get(prefix + name)
            if type(tensor) is torch.Tensor:  # keep_vars=True gives the parameters themselves
                split = self.shards(self.path + name, tensor)
                state[prefix + name] = marked(tensor, split, self.rank, weakref.ref(self.owner))
