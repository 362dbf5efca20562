"""optimizer_state: shard the state that an optimizer has of dense parameters; refuse optimizers that shards break."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from autotp.errors import AutoTPError
from autotp.weights.load_state_dict import dense_shape
from autotp.weights.registry import Sharded, latest, living
from autotp.weights.slicing import local_part

__all__ = ["check_optimizers"]

_NOT_ELEMENTWISE = tuple(getattr(torch.optim, n) for n in ("Adafactor", "LBFGS", "Muon") if hasattr(torch.optim, n))
"""torch's optimizers whose step on an element depends on the parameter's other elements."""

_Entry = tuple[Any, int, list[weakref.ref[Sharded]]]
_checked: weakref.WeakKeyDictionary[Optimizer, _Entry] = weakref.WeakKeyDictionary()
"""Per optimizer the state dict and the latest model at its last check, and the models whose parameters it has."""
_hooks: list[Any] = []


def check_optimizers() -> None:
    """Check every optimizer before its first step after a ``parallelize`` or a ``load_state_dict``.

    State of the dense shape, from earlier steps or from a checkpoint, becomes this rank's shard. Steps are counted, so
    that a rank that skips one is found (``GradScaler`` skips one where only this rank's shards overflow).
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    entry = _checked.get(optimizer)
    if entry is None or entry[0] is not optimizer.state or entry[1] != latest():
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        models = [model for model in living() if any(id(p) in ids for _, p, _ in model.placed())]
        for model in models:
            _shard_state(optimizer, model, ids)
        entry = _checked[optimizer] = optimizer.state, latest(), [weakref.ref(model) for model in models]
    for reference in entry[2]:
        if getattr(optimizer, "found_inf", None) is not None:
            raise AutoTPError(
                "a fused optimizer under GradScaler skips a step where this rank's shards overflow, and other ranks "
                "would not: train in bfloat16, without a scaler"
            )
        if (sharded := reference()) is not None:
            sharded.stepped()


def _shard_state(optimizer: Optimizer, model: Sharded, ids: set[int]) -> None:
    """Shard an optimizer's state of a model's split parameters.

    Raises:
        AutoTPError: the optimizer needs whole parameters, or has state of an unknown shape.
    """
    for name, parameter, shards in model.placed():
        if not shards or id(parameter) not in ids:
            continue
        if isinstance(optimizer, _NOT_ELEMENTWISE):
            raise AutoTPError(
                f"{type(optimizer).__name__} needs the whole of {name} for a step on any element of it, and this rank "
                "holds a shard: use an optimizer that works element by element (SGD, Adam, AdamW, ...)"
            )
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape == parameter.shape:
                continue
            if tuple(value.shape) != dense_shape(parameter.shape, shards):
                raise AutoTPError(
                    f"{type(optimizer).__name__} keeps a {key} of shape {tuple(value.shape)} for {name}, of which this "
                    f"rank holds {tuple(parameter.shape)}: make the optimizer after autotp.parallelize"
                )
            state[key] = local_part(value, shards, model.mesh.rank).clone()
