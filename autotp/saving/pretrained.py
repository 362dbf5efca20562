"""pretrained: let ``save_pretrained`` of transformers and peft write a parallelized model's checkpoint.

Their functions decide what a checkpoint consists of: names, files, config, adapters. Here they run on rank 0, with
tensors that have a name and a shape and no memory, and their writes of weight files are noted in place of being done.
All ranks then write the noted files.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
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
from autotp.runtime.graph_runtime import runtime_of
from autotp.saving.dense_tensors import dense_tensors
from autotp.saving.weight_file import DenseTensor, WeightFile
from autotp.saving.write_checkpoint import write_checkpoint
from autotp.weights.shard_tensor import ShardTensor

__all__ = ["SavePretrained", "has_save_pretrained", "wrap_save_pretrained"]

_WRITERS = {"transformers.modeling_utils": "safe_save_file", "peft.peft_model": "safe_save_file"}
"""The modules that write weight files, and the name under which they know the function that writes one."""
_ELSEWHERE = {
    "push_to_hub": "the folder is complete only when all ranks have written. Save it, then upload it from one rank "
    "(huggingface_hub.upload_folder)",
    "distributed_checkpoint": "that is a checkpoint per rank, which torch.distributed.checkpoint.save({'model': "
    "model.state_dict()}) writes",
}
"""Options that are not for all ranks together, and what to do in their place."""


def has_save_pretrained(model: nn.Module) -> bool:
    """Whether a model's class has its ``save_pretrained`` from a library whose writes can be noted."""
    return any(cls.__module__ in _WRITERS and "save_pretrained" in cls.__dict__ for cls in type(model).__mro__)


def wrap_save_pretrained(model: nn.Module) -> None:
    """Replace ``save_pretrained`` of a parallelized model and of its submodules: called on all ranks, it writes the
    dense model. With a state dict of full tensors it does what it did."""
    for module in model.modules():
        if "_autotp" in module.__dict__ and has_save_pretrained(module):
            module.__dict__["save_pretrained"] = SavePretrained(module)


class SavePretrained:
    """The ``save_pretrained`` of a parallelized model; its signature is the model's own.

    Args:
        model: the model, or a submodule.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        functools.update_wrapper(self, _original(model))

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint of the dense model. Collective, unless full tensors are passed as ``state_dict``.

        Raises:
            AutoTPError: it is to be uploaded, too, or written in another format.
            WeightsError: see :func:`autotp.save`.
        """
        model, original = self.model, _original(self.model)
        options = _by_name(original, save_directory, args, kwargs)
        state = options.pop("state_dict", None)
        if state is not None and not any(isinstance(x, ShardTensor) for x in state.values()):
            if not state:  # of a rank that gets none from full_state_dict(model, rank=0)
                options["is_main_process"] = False
            original(save_directory, state_dict=_tied_again(model, state), **options)
            if options.get("is_main_process", True):
                _correct_index(model, Path(save_directory))
            return
        for name, reason in _ELSEWHERE.items():
            if options.get(name):
                raise AutoTPError(f"save_pretrained({name}=True) of a parallelized model: {reason}")
        if options.get("safe_serialization") is False:
            raise AutoTPError("save_pretrained(safe_serialization=False) of a parallelized model: only safetensors can")
        options["is_main_process"] = True

        def describe(folder: Path) -> list[WeightFile]:
            files = _noted_files(model, folder, original, options)
            if files is None and "save_original_format" in inspect.signature(original).parameters:
                # names in files that stand for several tensors of the model, or for parts of one
                files = _noted_files(model, folder, original, {**options, "save_original_format": False})
            if files is None:
                raise WeightsError(
                    f"{type(model).__name__}.save_pretrained writes tensors that are not in its state dict: write "
                    "autotp.full_state_dict(model, rank=0) in its place"
                )
            return files

        words = {n: str(x) for n, x in sorted(options.items()) if _has_words(x) and n != "token"}
        write_checkpoint(runtime_of(model), save_directory, describe, words)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        """The function of the copied model."""
        return SavePretrained(copy.deepcopy(self.model, memo))


def _original(model: nn.Module) -> Any:
    """The ``save_pretrained`` of a model's class, bound to it."""
    cls: Any = type(model)
    return cls.save_pretrained.__get__(model)


def _tied_again(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Full tensors of which equal ones under names of one weight are one, which is then written once."""
    tied = runtime_of(model).tied
    firsts = {name: state.get(tied.get(name, name), tensor) for name, tensor in state.items()}
    return {n: firsts[n] if isinstance(x, torch.Tensor) and torch.equal(firsts[n], x) else x for n, x in state.items()}


def _by_name(original: Any, folder: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call but the folder, each by its name."""
    parameters = list(inspect.signature(original).parameters.values())[1:]
    positional = inspect.signature(original).bind(folder, *args, **kwargs).args[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, positional)), **kwargs}


def _has_words(value: Any) -> bool:
    """Whether a value's text is the same on all ranks where the value is."""
    if isinstance(value, (list, tuple)):
        return all(map(_has_words, value))
    return value is None or isinstance(value, (str, int, float, bool, os.PathLike))


class _Named(torch.Tensor):
    """A tensor of the dense model without memory. What copies it whole keeps its name, and anything else loses it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    source: str

    @staticmethod
    def of(tensor: DenseTensor) -> _Named:
        """A named tensor of the same shape and dtype."""
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        named: _Named = torch.Tensor._make_subclass(_Named, empty, False)
        named.source = tensor.source
        return named

    def clone(self, *args: Any, **kwargs: Any) -> _Named:
        """The same."""
        return self

    def detach(self) -> _Named:
        """The same."""
        return self

    def contiguous(self, *args: Any, **kwargs: Any) -> _Named:
        """The same."""
        return self


def _noted_files(model: nn.Module, folder: Path, original: Any, options: Mapping[str, Any]) -> list[WeightFile] | None:
    """The weight files that ``save_pretrained`` would write; it writes all others.

    Returns:
        None if it writes a tensor that it has computed.
    """
    empty = {t.key: _Named.of(t) for t in dense_tensors(model)}
    calls: list[tuple[dict[str, torch.Tensor], str, Any]] = []
    with _noted_writes(calls):
        original(folder, state_dict=empty, **options)
    _correct_index(model, folder)
    files = []
    for tensors, path, metadata in calls:
        noted = [DenseTensor(k, x.source, tuple(x.shape), x.dtype) for k, x in tensors.items() if isinstance(x, _Named)]
        if len(noted) < len(tensors):
            return None
        files.append(WeightFile(os.path.relpath(path, folder), tuple(noted), dict(metadata or {})))
    return files


def _correct_index(model: nn.Module, folder: Path) -> None:
    """Write the dense model's number of parameters into the index, where transformers has counted this rank's."""
    shapes = {t.source: t.shape for t in dense_tensors(model)}
    count = sum(math.prod(shapes.get(name, p.shape)) for name, p in model.named_parameters())
    for path in folder.glob("*.safetensors.index*.json"):
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
        if hasattr(bars := sys.modules.get("transformers.utils.logging"), "_tqdm_active"):  # they would be full at once
            replaced.append((bars, "_tqdm_active", bars._tqdm_active))  # type: ignore[arg-type, union-attr]
            bars._tqdm_active = False  # type: ignore[union-attr]
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
