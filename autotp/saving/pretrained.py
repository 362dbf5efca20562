"""pretrained: let ``save_pretrained`` of transformers and peft write a parallelized model's checkpoint.

Their functions decide what a checkpoint consists of: names, files, config, adapters. Here they run on rank 0, with
tensors that have a shape and no memory, and their writes of weight files are noted in place of being done. All ranks
then write the noted files.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from autotp.errors import AutoTPError, WeightsError
from autotp.runtime.runtime import Runtime
from autotp.saving.weight_file import DenseTensor, WeightFile
from autotp.saving.write_checkpoint import dense_tensors, write_checkpoint
from autotp.weights.shard_tensor import ShardTensor

__all__ = ["wrap_save_pretrained"]

_WRITERS = {"transformers.modeling_utils": "safe_save_file", "peft.peft_model": "safe_save_file"}
"""The modules that write weight files, and the name under which they know the function that writes one."""


def wrap_save_pretrained(runtime: Runtime) -> None:
    """Replace a model's ``save_pretrained``, if it has one: called on all ranks, it writes the dense model.

    With a state dict of full tensors it does what it did.
    """
    original = getattr(runtime.model, "save_pretrained", None)
    if callable(original):
        runtime.model.__dict__["save_pretrained"] = SavePretrained(runtime)


class SavePretrained:
    """The ``save_pretrained`` of a parallelized model; its signature is the model's own.

    Args:
        runtime: the model's runtime.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        functools.update_wrapper(self, _original(runtime.model))

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint of the dense model. Collective, unless full tensors are passed as ``state_dict``.

        Raises:
            AutoTPError: it is to be uploaded, too.
            WeightsError: see :func:`autotp.save`.
        """
        model = self.runtime.model
        original = _original(model)
        names = ("is_main_process", "state_dict") if hasattr(model, "generate") else ()
        kwargs |= dict(zip(names, args))
        args = args[len(names) :]
        state = kwargs.pop("state_dict", None)
        if state is not None and not any(isinstance(x, ShardTensor) for x in state.values()):
            original(save_directory, *args, state_dict=state, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            raise AutoTPError(
                "save_pretrained(push_to_hub=True) of a parallelized model: the folder is complete only when all ranks "
                "have written. Save it, then upload it from one rank (huggingface_hub.upload_folder)"
            )
        kwargs |= {"is_main_process": True}

        def describe(folder: Path) -> list[WeightFile]:
            files = _noted_files(model, folder, original, args, kwargs)
            if files is None:  # names in files that stand for several tensors of the model, or for parts of one
                files = _noted_files(model, folder, original, args, {**kwargs, "save_original_format": False})
            if files is None:
                raise WeightsError(
                    f"{type(model).__name__}.save_pretrained writes tensors that are not in its state dict: write "
                    "autotp.full_state_dict(model, rank=0) in its place"
                )
            return files

        write_checkpoint(self.runtime, save_directory, describe)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        """The function of a copy of the model."""
        return SavePretrained(copy.deepcopy(self.runtime, memo))


def _original(model: nn.Module) -> Any:
    """The ``save_pretrained`` of a model's class, bound to it."""
    cls: Any = type(model)
    return cls.save_pretrained.__get__(model)


def _noted_files(
    model: nn.Module, folder: Path, original: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[WeightFile] | None:
    """The weight files that ``save_pretrained`` would write; it writes all others.

    Returns:
        None if it writes a tensor that it has computed.
    """
    dense = dense_tensors(model)
    empty = {t.key: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in dense}
    source_of = {id(tensor): name for name, tensor in empty.items()}
    calls: list[tuple[dict[str, torch.Tensor], str, Any]] = []
    with _noted_writes(calls):
        original(folder, *args, state_dict=dict(empty), **kwargs)
    _correct_index(model, folder)
    files = []
    for tensors, path, metadata in calls:
        if any(id(x) not in source_of for x in tensors.values()):
            return None
        noted = [DenseTensor(key, source_of[id(x)], tuple(x.shape), x.dtype) for key, x in tensors.items()]
        files.append(WeightFile(os.path.relpath(path, folder), tuple(noted), dict(metadata or {})))
    return files


def _correct_index(model: nn.Module, folder: Path) -> None:
    """Write the dense model's number of parameters into the index, where transformers has counted this rank's."""
    shapes = {t.source: t.shape for t in dense_tensors(model)}
    count = sum(math.prod(shapes.get(name, p.shape)) for name, p in model.named_parameters())
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text())
        if "total_parameters" in index.get("metadata", {}):
            index["metadata"]["total_parameters"] = count
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _noted_writes(calls: list[tuple[dict[str, torch.Tensor], str, Any]]) -> Iterator[None]:
    """Note the weight files that transformers and peft write, in place of writing them."""

    def note(tensors: dict[str, torch.Tensor], filename: Any, metadata: Any = None) -> None:
        calls.append((dict(tensors), os.fspath(filename), metadata))

    replaced: list[tuple[ModuleType, str, Any]] = []
    try:
        for name, function in _WRITERS.items():
            if (module := sys.modules.get(name)) is not None:
                replaced.append((module, function, getattr(module, function)))
                setattr(module, function, note)
        yield
    finally:
        for module, function, writer in replaced:
            setattr(module, function, writer)
