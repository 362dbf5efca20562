"""torch_checkpoint: torch's and safetensors' functions on state dicts, correct where values are shards.

``torch.distributed.checkpoint`` reads the chunks of a :class:`ShardTensor` by itself, but compares the size that it has
in memory with the dense one. Its ``get_model_state_dict(full_state_dict=True)`` gathers tensors of its own kinds only.
safetensors has no way to say that a tensor is one rank's shard. From the first ``parallelize`` on these functions know.
For all other tensors they do what they did.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner, state_dict
from torch.utils import _pytree as pytree

from autotp.errors import AutoTPError, WeightsError
from autotp.utils.patching import replace_function
from autotp.weights.registry import living, memory_key
from autotp.weights.shard_tensor import ShardTensor

__all__ = ["patch_state_dict_functions"]


def patch_state_dict_functions() -> None:
    """Let torch's checkpoint functions see shards as chunks, and safetensors refuse them.

    Raises:
        AutoTPError: torch's functions are not those that autotp knows.
    """
    _patch(default_planner, "create_default_local_load_plan", _load_plan)
    _patch(state_dict, "_gather_state_dict", _gather_state_dict)
    if (safetensors := _safetensors()) is not None:
        known = [n for n in ("_flatten_as_ptr", "_flatten") if hasattr(safetensors, n)]
        for name in known or ("save", "save_file"):
            _patch(safetensors, name, _refuse_shards)
        if hasattr(safetensors, "_remove_duplicate_names"):
            _patch(safetensors, "_remove_duplicate_names", _duplicate_names)


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        return None


def _patch(module: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a function that other functions of a module find by its name."""
    if not replace_function(module, name, replacement):
        raise AutoTPError(
            f"{module.__name__} of torch {torch.__version__} has no {name}: checkpoints would hold this rank's shards "
            "only. Use a torch release that autotp supports"
        )


class _DenseSize:
    """A shard as torch's load plan sees it: chunks of a tensor of the dense size."""

    def __init__(self, shard: ShardTensor) -> None:
        self._shard = shard
        self.__create_chunk_list__ = shard.__create_chunk_list__

    def size(self) -> torch.Size:
        """The dense tensor's size."""
        return self._shard.sharding.dense_shape(self._shard.shape)


def _load_plan(original: Callable[..., Any], values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """torch's plan of what a rank reads; sizes are compared with those of the dense tensors."""
    seen = {name: _DenseSize(x) if isinstance(x, ShardTensor) else x for name, x in values.items()}
    return original(seen, *args, **kwargs)


def _gather_state_dict(original: Callable[..., Any], values: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's state dict of full tensors; one shard after another is gathered.

    Where only some ranks are to have the result, the others drop each tensor at once.
    """
    ranks_only = kwargs.get("ranks_only", ())
    keeps = not ranks_only or torch.distributed.get_rank() in ranks_only
    on_cpu = kwargs.get("cpu_offload", False)

    def full(x: Any) -> Any:
        if not isinstance(x, ShardTensor):
            return x
        dense = x.full()
        return (dense.cpu() if on_cpu else dense) if keeps else None

    return original(pytree.tree_map(full, values), *args, **kwargs)


def _refuse_shards(original: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """safetensors' view of tensors that it is about to write; a shard among them is an error.

    Raises:
        WeightsError: a tensor is a rank's shard: a ShardTensor, or in the memory of a split parameter.
    """
    if isinstance(tensors, Mapping):
        split = {key for key, shards in _parameter_memory().items() if shards}
        for name, x in tensors.items():
            if isinstance(x, torch.Tensor) and (isinstance(x, ShardTensor) or memory_key(x) in split):
                raise WeightsError(
                    f"{name} is this rank's shard of a tensor of a parallelized model, and safetensors would write it "
                    "under the name of the dense tensor: call autotp.save(model, folder) or "
                    "model.save_pretrained(folder) on all ranks, or write autotp.full_state_dict(model, rank=0)"
                )
    return original(tensors, *args, **kwargs)


def _duplicate_names(original: Callable[..., Any], values: Mapping[str, torch.Tensor], **kwargs: Any) -> Any:
    """The names of tied tensors but one, as safetensors' ``save_model`` and ``load_model`` leave them out.

    Parameters that lie side by side in one memory, as a model's merged weights do, are not tied. So each of them is
    replaced by a small tensor of its own.
    """
    if "preferred_names" not in kwargs:  # save_model
        _refuse_shards(lambda _: None, values)
    memory, stand_ins = _parameter_memory(), dict[Any, torch.Tensor]()
    for name, x in values.items():
        if (key := memory_key(x)) in memory:
            values = {**values, name: stand_ins.setdefault(key, torch.empty(1))}
    return original(values, **kwargs)


def _parameter_memory() -> dict[Any, Any]:
    """The split dims of the parameters of the models that are alive, by a key of their memory."""
    return {memory_key(p): shards for model in living() for _, p, shards in model.placed()}
