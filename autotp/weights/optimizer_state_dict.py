"""optimizer_state_dict: an optimizer's state dict knows, as a model's does, of which dense tensors it has shards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from autotp.errors import WeightsError
from autotp.utils.patching import replace_function
from autotp.weights.load_state_dict import dense_shape, foreign_shard
from autotp.weights.registry import Sharded, living
from autotp.weights.shard_tensor import ShardTensor, plain
from autotp.weights.slicing import local_part
from autotp.weights.state_dict import marked
from passes import Shards

__all__ = ["patch_optimizers"]

_Split = tuple[str, torch.nn.Parameter, Mapping[int, Shards], Sharded]


def patch_optimizers() -> None:
    """Let every optimizer's ``state_dict`` mark its shards, and ``load_state_dict`` check and shard what it loads.

    State of a split parameter, and of its shape, is a ShardTensor in the state dict. Loaded state is a plain tensor
    again: the shard of this rank, or the dense tensor, of which this rank's part is taken.
    """
    replace_function(Optimizer, "state_dict", _state_dict)
    replace_function(Optimizer, "load_state_dict", _load_state_dict)


def _split_parameters(optimizer: Optimizer) -> dict[int, _Split]:
    """The split parameters of parallelized models among an optimizer's, by id."""
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {
        id(p): (name, p, shards, model)
        for model in living()
        for name, p, shards in model.placed()
        if shards and id(p) in ids
    }


def _entries(
    optimizer: Optimizer, state: Mapping[str, Any], split: Mapping[int, _Split]
) -> Iterator[tuple[dict[str, Any], str, Any, _Split]]:
    """The state of split parameters in a state dict: the dict that holds a value, its key, the value, and whose it is.

    The parameters are numbered in the order of the optimizer's groups, as torch numbers them.
    """
    numbers = [n for group in state.get("param_groups", ()) for n in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in zip(numbers, parameters):
        values = state.get("state", {}).get(number)
        if id(parameter) in split and isinstance(values, dict):
            for key, value in values.items():
                if isinstance(value, torch.Tensor) and value.dim() == parameter.dim():
                    yield values, key, value, split[id(parameter)]


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose per-parameter dicts can be changed."""
    entries = {n: dict(values) if isinstance(values, dict) else values for n, values in state.get("state", {}).items()}
    return {**state, "state": entries}


def _state_dict(original: Callable[..., Any], optimizer: Optimizer) -> Any:
    state = original(optimizer)
    if not (split := _split_parameters(optimizer)):
        return state
    state = _copied(state)
    for values, key, value, (_, parameter, shards, model) in list(_entries(optimizer, state, split)):
        if value.shape == parameter.shape and type(value) is torch.Tensor:
            values[key] = marked(value, shards, model.mesh.rank, weakref.ref(model))
    return state


def _load_state_dict(original: Callable[..., Any], optimizer: Optimizer, state_dict: Any) -> Any:
    """torch's ``load_state_dict``; the state of split parameters becomes this rank's shards.

    Raises:
        WeightsError: the state has another rank's shard, or one of another ``tp``.
    """
    if not (split := _split_parameters(optimizer)):
        return original(optimizer, state_dict)
    state = _copied(state_dict)
    for values, key, value, (name, parameter, shards, model) in list(_entries(optimizer, state, split)):
        if isinstance(value, ShardTensor):
            if (error := foreign_shard(f"{key} of {name}", value.sharding, shards, model.mesh.rank)) is not None:
                raise WeightsError(error)
        elif value.shape != parameter.shape and tuple(value.shape) == dense_shape(parameter.shape, shards):
            value = local_part(value, shards, model.mesh.rank).clone()
        values[key] = plain(value)
    return original(optimizer, state)
