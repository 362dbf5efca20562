"""loading: ``load_state_dict`` of a parallelized model takes dense tensors as well as local ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autotp.shards import local_part
from passes import Shards

__all__ = ["accept_dense", "dense_shape"]


def accept_dense(model: nn.Module, shards: Mapping[str, Mapping[int, Shards]], rank: int) -> None:
    """Let the model, or whatever it is a part of, load dense state dicts: each tensor is cut to the rank's share.

    A tensor of the dense shape is cut, one of the local shape is taken as it is, and any other is an error
    of ``load_state_dict`` that says both. Where all ranks hold the whole there is no difference.

    Args:
        model: the parallelized model.
        shards: the split dims of each split parameter, by any of its names.
        rank: this rank.

    Example:
        >>> model = autotp.parallelize(model, tp=4)
        >>> model.load_state_dict(torch.load("dense.pt"))
    """
    for name, module in model.named_modules(remove_duplicate=False):
        path = f"{name}." if name else ""
        own = {n: shards[path + n] for n in module._parameters if shards.get(path + n)}
        if own:
            module.register_load_state_dict_pre_hook(_Cut(own, rank))


class _Cut:
    """The pre-hook of a module that holds shards."""

    def __init__(self, shards: Mapping[str, Mapping[int, Shards]], rank: int) -> None:
        self.shards, self.rank = shards, rank

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool,
        _missing: list[str], _unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        for name, shards in self.shards.items():
            given, held = state.get(prefix + name), module._parameters[name]
            if not isinstance(given, torch.Tensor) or held is None or given.shape == held.shape:
                continue  # what is no tensor is torch's to refuse
            dense = dense_shape(held.shape, shards)
            if tuple(given.shape) == dense:
                state[prefix + name] = local_part(given.detach(), shards, self.rank).clone()
                continue
            errors.append(
                f"size mismatch for {prefix}{name}: copying a param with shape {given.shape} from checkpoint, the "
                f"shape in the dense model is {torch.Size(dense)}, this rank's share of it is {held.shape}."
            )
            state[prefix + name] = held  # torch would say it again, and know of the share only


def dense_shape(local: Sequence[int], shards: Mapping[int, Shards]) -> tuple[int, ...]:
    """The shape of the dense tensor of which a rank holds a share of shape ``local``."""
    return tuple(shards[d].size if d in shards else n for d, n in enumerate(local))
