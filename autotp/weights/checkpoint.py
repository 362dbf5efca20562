"""checkpoint: open weight files, folders and mappings; no tensor is read, only the descriptions of them.

Each format has a file of its own, which says where in its files each tensor lies. :mod:`autotp.weights.tensor_source`
reads regions of tensors from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autotp.errors import WeightsError
from autotp.weights.distributed_checkpoint import METADATA, distributed_tensors, file_in, parts_in_safetensors
from autotp.weights.foreign_formats import ZIP, format_of_file
from autotp.weights.safetensors_file import safetensors_tensors
from autotp.weights.tensor_source import FileTensor, MappingTensor, TensorSource, WeightFile, contiguous_strides
from autotp.weights.torch_save_file import MOST_HEADER, state_dict_tensors

__all__ = ["Source", "open_checkpoint"]

Source = str | Path | Mapping[str, Any]
"""Where weights come from."""

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files of a saved model, in the order in which transformers looks for them."""


def open_checkpoint(weights: Source) -> dict[str, TensorSource]:
    """The tensors of a checkpoint, by name; no tensor is read, only the files' descriptions of them.

    Args:
        weights: a ``.safetensors`` file, a state dict's file that ``torch.save`` wrote, a folder in which transformers
            or torch.distributed.checkpoint has saved a model, or a mapping. A mapping's values are tensors, or objects
            with a shape and a dtype that return a region when sliced.

    Returns:
        The tensors; a ``TrainingState`` if the checkpoint may have others beside the model's.

    Raises:
        WeightsError: it is none of these, or damaged; the message says what it is.
    """
    if isinstance(weights, Mapping):
        return {name: _from_value(name, value) for name, value in weights.items()}
    if not isinstance(weights, (str, Path)):
        raise WeightsError(f"weights is a path or a mapping from names to tensors, not a {type(weights).__name__}")
    try:
        return _from_path(Path(weights))
    except WeightsError:
        raise
    except Exception as error:  # a folder without permission, a file that vanishes, whatever damage does
        raise WeightsError(f"weights: {weights} cannot be read: {type(error).__name__}: {error}") from error


def _from_path(path: Path) -> dict[str, TensorSource]:
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise WeightsError(f"weights: there is no file or folder {path}")
    if path.name == METADATA:
        return distributed_tensors(path.parent)
    return _from_index(path) if path.name.endswith(".index.json") else dict(_from_file(path))


def _from_value(name: str, value: Any) -> MappingTensor:
    try:
        shape = tuple(int(n) for n in value.shape)
        dtype = value.dtype if isinstance(value.dtype, torch.dtype) else _torch_dtype(value.dtype)
    except (AttributeError, TypeError):
        raise WeightsError(f"weights: {name} is a {type(value).__name__}, not a tensor: leave it out") from None
    strides = value.stride() if isinstance(value, torch.Tensor) else contiguous_strides(shape)
    return MappingTensor(shape, tuple(strides), dtype, value)


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _from_folder(folder: Path) -> dict[str, TensorSource]:
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is not None:
        return _from_index(file) if file.suffix == ".json" else dict(_from_file(file))
    if (folder / METADATA).is_file():
        return distributed_tensors(folder)
    content = sorted(folder.iterdir())
    parts = parts_in_safetensors(folder, [p for p in content if p.suffix == ".safetensors"])
    if parts is not None:
        return parts
    if any(p.suffix == METADATA for p in content):
        raise WeightsError(
            f"weights: {folder} was written by torch.distributed.checkpoint without a common {METADATA}: each rank "
            "described its own part, for ranks like it. Save it with use_collectives=True"
        )
    told = next((text for p in content if p.is_file() and (text := format_of_file(p))), None)
    names = ", ".join(p.name for p in content[:8]) or "nothing"
    raise WeightsError(
        f"weights: {folder} has none of {', '.join(_FILES)}, {METADATA}, but {names}: pass the file"
        + (f". One of these is {told}, which autotp does not read" if told else "")
    )


def _from_index(index: Path) -> dict[str, TensorSource]:
    if index.stat().st_size > MOST_HEADER:
        raise WeightsError(f"weights: {index} is no index of a checkpoint: it has more than {MOST_HEADER} bytes")
    try:
        file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WeightsError(f"weights: {index} is no index of a checkpoint: it has no weight_map") from None
    files: dict[Any, dict[str, FileTensor]] = {}
    for name, file in file_of.items():
        if not isinstance(file, str) or file not in files:
            path = file_in(index.parent, file, f"{index} (for {name})")
            files[file] = _from_file(path)
        if name not in files[file]:
            raise WeightsError(f"weights: {index} says that {name} is in {file}, which has no such tensor")
    return {name: files[file][name] for name, file in file_of.items()}


def _from_file(path: Path) -> dict[str, FileTensor]:
    if told := format_of_file(path):
        raise WeightsError(
            f"weights: {path} is {told}, which autotp does not read: load it and pass the mapping from names to "
            "tensors, or save the model as safetensors"
        )
    file = WeightFile.at(path)
    with open(path, "rb") as opened:
        is_zip = opened.read(4) == ZIP
    return state_dict_tensors(file) if is_zip else safetensors_tensors(file)
