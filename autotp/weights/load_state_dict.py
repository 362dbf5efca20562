"""load_state_dict: let a parallelized model load dense tensors as well as this rank's shards, and no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from autotp.errors import WeightsError
from autotp.weights.shard_tensor import Sharding, ShardTensor, plain
from autotp.weights.slicing import local_part
from passes import Shards

__all__ = ["Split", "accept_dense_state", "dense_shape", "foreign_shard", "forget_dense_state"]

Split = Callable[[str, torch.Tensor], Mapping[int, Shards]]
"""Returns the split dims of a parameter or buffer, by any of its names and by what this rank holds of it."""


def accept_dense_state(model: nn.Module, shards: Split, rank: int) -> None:
    """Let the model, and any module that contains it, load dense state dicts.

    A tensor of the dense shape is sharded, one of the shard's shape is taken as it is, and any other is an error of
    ``load_state_dict`` that names both shapes. A shard that another rank's state dict has, or one of another ``tp``, is
    a WeightsError that names both ranks, before anything is loaded. Unsplit tensors load as always.

    Args:
        model: the parallelized model.
        shards: returns the split dims of a parameter or buffer.
        rank: this rank.

    Example:
        >>> model = autotp.parallelize(model, tp=4)
        >>> model.load_state_dict(torch.load("dense.pt"))
    """
    model.register_load_state_dict_pre_hook(_RefuseForeignShards(shards, rank))
    for name, module in model.named_modules(remove_duplicate=False):
        if module._parameters or module._buffers:
            module.register_load_state_dict_pre_hook(_ShardState(f"{name}." if name else "", shards, rank))


class _RefuseForeignShards:
    """The pre-hook of the model: it looks at all shards in a state dict before any tensor is loaded."""

    def __init__(self, shards: Split, rank: int) -> None:
        self.shards, self.rank = shards, rank

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Raise a WeightsError if one is another rank's, or of another number of ranks."""
        own = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in own:
            loaded = state.get(prefix + name)
            if isinstance(loaded, ShardTensor):
                shards = self.shards(name, tensor)
                if (error := foreign_shard(prefix + name, loaded.sharding, shards, self.rank)) is not None:
                    raise WeightsError(error)


def forget_dense_state(model: nn.Module) -> None:
    """Undo :func:`accept_dense_state`."""
    own = (_ShardState, _RefuseForeignShards)
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for key in [k for k, wrapped in hooks.items() if isinstance(getattr(wrapped, "hook", None), own)]:
            del hooks[key]


class _ShardState:
    """The pre-hook of a module that holds shards, or may hold some later."""

    def __init__(self, path: str, shards: Split, rank: int) -> None:
        self.path, self.shards, self.rank = path, shards, rank

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool,
        _missing: list[str], _unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        for name, own in (*module._parameters.items(), *module._buffers.items()):
            loaded = state.get(prefix + name)
            if not isinstance(loaded, torch.Tensor) or own is None:
                continue  # torch refuses values that are no tensors
            shards = self.shards(self.path + name, own)
            if isinstance(loaded, ShardTensor):
                state[prefix + name] = plain(loaded)
                if (error := foreign_shard(prefix + name, loaded.sharding, shards, self.rank)) is not None:
                    errors.append(error)
                    state[prefix + name] = own
                    continue
            if not shards or loaded.shape == own.shape:
                continue
            dense = dense_shape(own.shape, shards)
            if tuple(loaded.shape) == dense:
                state[prefix + name] = local_part(loaded.detach(), shards, self.rank).clone()
                continue
            errors.append(
                f"size mismatch for {prefix}{name}: copying a param with shape {loaded.shape} from checkpoint, the "
                f"shape in the dense model is {torch.Size(dense)}, this rank's shard of it is {own.shape}."
            )
            state[prefix + name] = own  # else torch adds an error that names the shard's shape only


def foreign_shard(name: str, loaded: Sharding, shards: Mapping[int, Shards], rank: int) -> str | None:
    """The error of loading another shard than this rank's; None if it is this rank's.

    Args:
        name: the tensor's name.
        loaded: the indices that the loaded shard has.
        shards: the split dims of this rank's tensor.
        rank: this rank.
    """
    own = [Sharding(rank, dim, s) for dim, s in shards.items()]
    if own == [loaded]:
        return None
    return (
        f"{name}: the shard loaded is that of {loaded}, and this is {own[0] if own else 'unsplit here'}. A rank's "
        "state dict can be loaded by the same rank, at the same tp and with the same plan only. For a checkpoint that "
        "loads at any tp, write autotp.save(model, folder) or torch.distributed.checkpoint.save"
    )


def dense_shape(local: Sequence[int], shards: Mapping[int, Shards]) -> tuple[int, ...]:
    """The shape of the dense tensor of which a rank holds a shard of shape ``local``."""
    return tuple(shards[d].size if d in shards else n for d, n in enumerate(local))
