"""load_state_dict: let a parallelized model load dense tensors as well as shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autotp.weights.slicing import local_part
from passes import Shards

__all__ = ["accept_dense_state", "dense_shape", "forget_dense_state"]

Split = Callable[[str, torch.Tensor], Mapping[int, Shards]]
"""Returns the split dims of a parameter or buffer, by any of its names and by what this rank holds of it."""


def accept_dense_state(model: nn.Module, shards: Split, rank: int) -> None:
    """Let the model, and any module that contains it, load dense state dicts.

    A tensor of the dense shape is sharded, one of the shard's shape is taken as it is, and any other is an error of
    ``load_state_dict`` that names both shapes. Unsplit tensors load as always.

    Args:
        model: the parallelized model.
        shards: returns the split dims of a parameter or buffer.
        rank: this rank.

    Example:
        >>> model = autotp.parallelize(model, tp=4)
        >>> model.load_state_dict(torch.load("dense.pt"))
    """
    for name, module in model.named_modules(remove_duplicate=False):
        path = f"{name}." if name else ""
        if any(p is not None and shards(path + n, p) for n, p in module._parameters.items()) or module._buffers:
            module.register_load_state_dict_pre_hook(_ShardState(path, shards, rank))


def forget_dense_state(model: nn.Module) -> None:
    """Undo :func:`accept_dense_state`."""
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for key in [k for k, wrapped in hooks.items() if isinstance(getattr(wrapped, "hook", None), _ShardState)]:
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
            if not isinstance(loaded, torch.Tensor) or own is None or loaded.shape == own.shape:
                continue  # torch refuses values that are no tensors
            if not (shards := self.shards(self.path + name, own)):
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


def dense_shape(local: Sequence[int], shards: Mapping[int, Shards]) -> tuple[int, ...]:
    """The shape of the dense tensor of which a rank holds a shard of shape ``local``."""
    return tuple(shards[d].size if d in shards else n for d, n in enumerate(local))
