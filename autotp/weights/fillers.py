"""fillers: torch's functions that give a parameter new values by its shape or its other elements, where it is a shard.

``torch.nn.init`` draws as many numbers as the tensor has, with a deviation that follows from its shape, and
``vector_to_parameters`` cuts a vector by the parameters' sizes. Both would take a shard for the parameter: each rank
would fill its own with other numbers than the dense model gets. From the first ``parallelize`` on they fill the dense
tensor, and each rank takes its shard. ``torch.nn.utils.prune`` compares a parameter's elements with each other, and is
refused. For tensors of other models all do what torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import init
from torch.nn.utils import convert_parameters, prune

from autotp.errors import AutoTPError
from autotp.utils.hashing import stable_hash
from autotp.utils.patching import replace_function
from autotp.weights.load_state_dict import dense_shape
from autotp.weights.registry import Sharded, living
from autotp.weights.slicing import local_part
from passes import Shards

__all__ = ["patch_fillers"]

_RANDOM = ("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_",
           "kaiming_normal_", "orthogonal_", "sparse_", "eye_", "dirac_")  # fmt: skip
_INNER = ("_no_grad_uniform_", "_no_grad_normal_", "_no_grad_trunc_normal_")
"""Functions that those above call, and that a script reaches which has imported the ones above by name before."""
_FANS = "_calculate_fan_in_and_fan_out"
_VECTOR = "vector_to_parameters"


def patch_fillers() -> None:
    """Let torch's initializers, and ``vector_to_parameters``, fill shards as parts of the dense tensor."""
    for name in (*_RANDOM, *_INNER):
        replace_function(init, name, _filled)
    replace_function(init, _FANS, _fans)
    replace_function(prune.BasePruningMethod, "apply", _pruned)
    original = convert_parameters.vector_to_parameters
    replace_function(convert_parameters, _VECTOR, _from_vector)
    if getattr(nn.utils, _VECTOR) is original:
        setattr(nn.utils, _VECTOR, convert_parameters.vector_to_parameters)


def _pruned(original: Callable[..., Any], cls: Any, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """The start of a pruning method.

    Raises:
        AutoTPError: the tensor to prune is split.
    """
    placed = _placed(module._parameters.get(name))
    if placed is not None and placed[2]:
        raise AutoTPError(
            f"{cls.__name__} compares the elements of {placed[1]} with each other, and this rank holds a shard of "
            "them: prune the dense model, and call torch.nn.utils.prune.remove, before autotp.parallelize"
        )
    return original(cls, module, name, *args, **kwargs)


def _placed(tensor: Any) -> tuple[Sharded, str, Mapping[int, Shards]] | None:
    """The parallelized model that has a tensor as a parameter, with the parameter's name and split dims."""
    if isinstance(tensor, nn.Parameter):
        for model in living():
            for name, parameter, shards in model.placed():
                if parameter is tensor:
                    return model, name, shards
    return None


def _filled(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """An initializer: it fills a dense tensor, with rank 0's numbers, and each rank keeps its shard. Collective."""
    tensor = args[0] if args else kwargs.get("tensor")
    placed = _placed(tensor)
    if placed is None or placed[0].mesh.tp == 1:
        return original(*args, **kwargs)
    assert isinstance(tensor, torch.Tensor)
    model, name, shards = placed
    doing = f"torch.nn.init.{original.__name__.removeprefix('_no_grad_')} of {name}"
    model.agreement.check(doing, stable_hash(doing), dict)
    dense = tensor.detach().new_empty(dense_shape(tensor.shape, shards))
    if args:
        original(dense, *args[1:], **kwargs)
    else:
        original(**{**kwargs, "tensor": dense})
    with torch.no_grad():
        model.mesh.broadcast(dense)
        tensor.copy_(local_part(dense, shards, model.mesh.rank))
    return tensor


def _fans(original: Callable[..., tuple[int, int]], tensor: torch.Tensor) -> tuple[int, int]:
    """The numbers of inputs and outputs of the dense weight."""
    placed = _placed(tensor)
    if placed is not None and placed[2]:
        tensor = torch.empty(dense_shape(tensor.shape, placed[2]), device="meta")
    return original(tensor)


def _from_vector(original: Callable[..., None], vec: torch.Tensor, parameters: Iterable[torch.Tensor]) -> None:
    """``vector_to_parameters``, of this rank's shards one after another, or of all dense tensors.

    Raises:
        AutoTPError: the vector has another length than either.
    """
    listed = list(parameters)
    split: dict[int, tuple[Sharded, Mapping[int, Shards]]] = {}
    ids = {id(p) for p in listed}
    for model in living():
        split |= {id(p): (model, shards) for _, p, shards in model.placed() if shards and id(p) in ids}
    local = sum(p.numel() for p in listed)
    if not split or vec.numel() == local:
        original(vec, listed)
        return
    shapes = [dense_shape(p.shape, split[id(p)][1]) if id(p) in split else tuple(p.shape) for p in listed]
    sizes = [math.prod(shape) for shape in shapes]
    if vec.numel() != sum(sizes):
        raise AutoTPError(
            f"vector_to_parameters was expected to get {local} numbers, as many as this rank's shards have, or "
            f"{sum(sizes)}, as many as the dense parameters, and got {vec.numel()}"
        )
    parts = [
        local_part(x.view(shape), split[id(p)][1], split[id(p)][0].mesh.rank) if id(p) in split else x
        for p, x, shape in zip(listed, vec.split(sizes), shapes, strict=True)
    ]
    original(torch.cat([part.reshape(-1) for part in parts]), listed)
