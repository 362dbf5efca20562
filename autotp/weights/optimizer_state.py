"""optimizers: what an optimizer remembers of dense parameters is cut, and what it cannot do to shards refused."""

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

_WHOLE = tuple(getattr(torch.optim, n) for n in ("Adafactor", "LBFGS", "Muon") if hasattr(torch.optim, n))
"""torch's optimizers whose step on an element depends on the parameter's other elements."""

_seen: weakref.WeakKeyDictionary[Optimizer, tuple[Any, int, list[weakref.ref[Sharded]]]] = weakref.WeakKeyDictionary()
_hooked: list[Any] = []


def check_optimizers() -> None:
    """Look at every optimizer before its first step after a ``parallelize`` or a ``load_state_dict``.

    State of the dense shape, from steps taken before or from a checkpoint, is cut to the rank's share. Steps are
    counted, so that a rank that skips one (``GradScaler`` where only its shares overflow) is found.
    """
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    seen = _seen.get(optimizer)
    if seen is None or seen[0] is not optimizer.state or seen[1] != latest():
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        models = [model for model in living() if any(id(p) in ids for _, p, _ in model.placed())]
        for model in models:
            _cut_state(optimizer, model, ids)
        seen = _seen[optimizer] = optimizer.state, latest(), [weakref.ref(model) for model in models]
    for reference in seen[2]:
        if getattr(optimizer, "found_inf", None) is not None:
            raise AutoTPError(
                "a fused optimizer under GradScaler skips a step where this rank's shares overflow, and others would "
                "not: train in bfloat16, without a scaler"
            )
        if (stepping := reference()) is not None:
            stepping.stepped()


def _cut_state(optimizer: Optimizer, model: Sharded, ids: set[int]) -> None:
    """Cut what an optimizer keeps for a model's shards, or refuse."""
    for name, parameter, shards in model.placed():
        if not shards or id(parameter) not in ids:
            continue
        if isinstance(optimizer, _WHOLE):
            raise AutoTPError(
                f"{type(optimizer).__name__} needs the whole of {name} for a step on any of it, and this rank holds a "
                "share: use an optimizer that works element by element (SGD, Adam, AdamW, ...)"
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
