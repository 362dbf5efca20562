"""loading: ``load_state_dict`` of a parallelized model takes dense tensors as well as local ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autotp.weights.slicing import local_part
from passes import Shards

__all__ = ["accept_dense_state", "dense_shape"]

Split = Callable[[str, torch.Tensor], Mapping[int, Shards]]


def accept_dense_state(model: nn.Module, shards: Split, rank: int) -> None:
    """Let the model, or whatever it is a part of, load dense state dicts: each tensor is cut to the rank's share.

    A tensor of the dense shape is cut, one of the local shape is taken as it is, and any other is an error
    of ``load_state_dict`` that says both. Where all ranks hold the whole there is no difference.

    Args:
        model: the parallelized model.
        shards: gives the split dims of a parameter or buffer by any of its names, and by what this rank holds of it.
        rank: this rank.

    Example:
        >>> model = autotp.parallelize(model, tp=4)
        >>> model.load_state_dict(torch.load("dense.pt"))
    """
    for name, module in model.named_modules(remove_duplicate=False):
        path = f"{name}." if name else ""
        if any(p is not None and shards(path + n, p) for n, p in module._parameters.items()) or module._buffers:
            module.register_load_state_dict_pre_hook(_Cut(path, shards, rank))


class _Cut:
    """The pre-hook of a module that holds shards, or may come to."""

    def __init__(self, path: str, shards: Split, rank: int) -> None:
        self.path, self.shards, self.rank = path, shards, rank

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool,
        _missing: list[str], _unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        for name, held in (*module._parameters.items(), *module._buffers.items()):
            given = state.get(prefix + name)
            if not isinstance(given, torch.Tensor) or held is None or given.shape == held.shape:
                continue  # what is no tensor is torch's to refuse
            if not (shards := self.shards(self.path + name, held)):
                continue
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
