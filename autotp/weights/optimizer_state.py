"""optimizer_state: shard the state that an optimizer has of dense parameters; refuse optimizers that shards break."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from autotp.errors import AutoTPError, UntestedOptimizerWarning
from autotp.weights.load_state_dict import dense_shape
from autotp.weights.optimizer_probe import UntestableError, moves_parts_otherwise
from autotp.weights.registry import Sharded, latest, living
from autotp.weights.slicing import local_part
from passes import Shards

__all__ = ["check_optimizers"]

_NOT_ELEMENTWISE = ("lbfgs", "muon", "shampoo")
"""Parts of class names: such an optimizer is refused where it cannot be tried out."""
_ELEMENTWISE = "use an optimizer that works element by element (SGD, Adam, AdamW, Adagrad, RMSprop, ...)"


@dataclass
class _Checked:
    """What an optimizer was like at its last check; ``tried`` says with which options it has been tried out."""

    state: Any = None
    latest: int = -1
    options: list[Any] = field(default_factory=list)
    models: list[weakref.ref[Sharded]] = field(default_factory=list)
    tried: set[Any] = field(default_factory=set)


_checked: weakref.WeakKeyDictionary[Optimizer, _Checked] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


def check_optimizers() -> None:
    """Check every optimizer before its first step after a ``parallelize`` or a ``load_state_dict``.

    State of the dense shape, from earlier steps or from a checkpoint, becomes this rank's shard. An optimizer whose
    step on an element reads other elements is refused; a test on a small made-up parameter finds it, also again when
    options of its parameter groups change in kind. Steps are counted, so that a rank that skips one is found
    (``GradScaler`` skips one where only this rank's shards overflow).
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before_step)))  # in compiled steps, too


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    entry, options = _checked.get(optimizer, _Checked()), [_kinds(group) for group in optimizer.param_groups]
    if entry.state is not optimizer.state or entry.latest != latest() or entry.options != options:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        models = [model for model in living() if any(id(p) in ids for _, p, _ in model.placed())]
        _try_out(optimizer, {id(p): (n, s) for model in models for n, p, s in model.placed() if s}, entry.tried)
        for model in models:
            _shard_state(optimizer, model, ids)
        references = [weakref.ref(model) for model in models]
        entry = _checked[optimizer] = _Checked(optimizer.state, latest(), options, references, entry.tried)
    for reference in entry.models:
        if getattr(optimizer, "found_inf", None) is not None:
            raise AutoTPError(
                "a fused optimizer under GradScaler skips a step where this rank's shards overflow, and other ranks "
                "would not: train in bfloat16, without a scaler"
            )
        if (sharded := reference()) is not None:
            sharded.stepped()


def _kinds(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Of the options of a parameter group what may change how an optimizer reads: not the numbers, but which are 0."""
    kinds = [(name, _kind(value)) for name, value in group.items() if name not in ("params", "param_names", "lr")]
    return len(group["params"]), *kinds


def _kind(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return value != 0
    if isinstance(value, (tuple, list)) and len(value) <= 8:
        return tuple(map(_kind, value))
    return type(value).__name__


def _try_out(optimizer: Optimizer, split: Mapping[int, tuple[str, Mapping[int, Shards]]], tried: set[Any]) -> None:
    """Try the optimizer out with each kind of options and of parameters that it has of split parameters.

    Raises:
        AutoTPError: its step on an element reads other elements.
    """
    for group in optimizer.param_groups:
        for name, parameter, dims in _kinds_of_parameters(group, split):
            key = (_kinds(group)[1:], parameter.dim(), parameter.device.type, tuple(dims))
            if key in tried:
                continue
            kind = type(optimizer)
            try:
                dim = moves_parts_otherwise(optimizer, group, parameter, dims)
            except UntestableError as error:
                if any(part in c.__name__.lower() for c in kind.__mro__ for part in _NOT_ELEMENTWISE):
                    why = f"all of its kind do, and it could not be tried out: {error}"
                    raise AutoTPError(_refusal(kind.__name__, name, why)) from error
                if not kind.__module__.startswith("torch.distributed."):  # a wrapper: what it wraps is tried out, too
                    warnings.warn(
                        f"{kind.__name__} could not be tried out ({error}). On shards, such as this rank's of {name}, "
                        "it trains as on the dense model only if its step on an element reads no other element: no "
                        f"norms, means or products of matrices. If you do not know that, {_ELEMENTWISE}",
                        UntestedOptimizerWarning,
                        stacklevel=5,
                    )
            else:
                if dim is not None:
                    why = (
                        "its steps, tried out on a small parameter, are not those on the parameter's two parts, as "
                        "with norms, means and products of matrices, or with random numbers"
                    )
                    raise AutoTPError(_refusal(kind.__name__, f"dim {dim} of {name}", why))
            tried.add(key)


def _refusal(optimizer: str, needed: str, why: str) -> str:
    return (
        f"{optimizer} needs the whole of {needed} for a step on any element of it, and this rank holds a shard "
        f"({why}): {_ELEMENTWISE}"
    )


def _kinds_of_parameters(
    group: Mapping[str, Any], split: Mapping[int, tuple[str, Mapping[int, Shards]]]
) -> Iterator[tuple[str, torch.Tensor, list[int]]]:
    """For each number of dims a split parameter of the group, with its name and all dims by which such ones are cut."""
    found: dict[int, tuple[str, torch.Tensor, set[int]]] = {}
    for parameter in group["params"]:
        if id(parameter) in split:
            name, shards = split[id(parameter)]
            found.setdefault(parameter.dim(), (name, parameter, set()))[2].update(shards)
    for name, parameter, dims in found.values():
        yield name, parameter, sorted(dims)


def _shard_state(optimizer: Optimizer, model: Sharded, ids: set[int]) -> None:
    """Shard an optimizer's state of a model's split parameters.

    Raises:
        AutoTPError: the optimizer has state of an unknown shape.
    """
    for name, parameter, shards in model.placed():
        if not shards or id(parameter) not in ids:
            continue
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
