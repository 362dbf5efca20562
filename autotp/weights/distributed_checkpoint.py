"""distributed_checkpoint: the tensors of a folder that torch.distributed.checkpoint wrote.

``dcp.save`` writes files with the extension ``distcp``, in which parts of tensors lie one after another, each as
``torch.save`` writes it, and a pickle ``.metadata`` that says where. The pickle is read without importing or calling
anything that it names, and a part is looked for in its file when it is first needed. ``HuggingFaceStorageWriter``
writes parts of tensors into safetensors files, each of which says which parts it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import torch

from autotp.errors import WeightsError
from autotp.weights.chunked_tensor import Chunk, chunked_tensor
from autotp.weights.foreign_formats import ZIP
from autotp.weights.inert_pickle import Made, unpickle
from autotp.weights.safetensors_file import safetensors_tensors, saved_offsets
from autotp.weights.tensor_source import FileTensor, TensorSource, WeightFile
from autotp.weights.torch_save_file import read_saved

__all__ = ["METADATA", "TrainingState", "distributed_tensors", "file_in", "parts_in_safetensors"]

METADATA = ".metadata"
"""The file that describes the others."""
MOST_METADATA = 1 << 30
"""The most bytes of it: 46,000 parts need 10 MB."""

_KNOWN = "torch.distributed.checkpoint."
_NAMES = {
    *(_KNOWN + "metadata." + name for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    _KNOWN + "filesystem._StorageInfo",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout", "torch.Size", "collections.OrderedDict", "builtins.set",
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
}  # fmt: skip
"""The classes and functions that a ``.metadata`` file names."""


class TrainingState(dict[str, TensorSource]):
    """The tensors of a training state, of which a model's are a part: its names may stand after ``model.``."""


def file_in(folder: Path, name: Any, told_by: object) -> Path:
    """The path of a file in a folder, which another file names.

    Only the name is judged: the file may be a link to elsewhere, as in the caches of Hugging Face's hub.

    Raises:
        WeightsError: the name is none, or leads out of the folder, or there is no such file.
    """
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        raise WeightsError(f"weights: {told_by} names {name!r}, which is no name of a file")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise WeightsError(f"weights: {told_by} names {name}, which is outside of its folder: no such file is read")
    if not (folder / path).is_file():
        raise WeightsError(f"weights: {told_by} names {name}, which is not there")
    return folder / path


def _is_size(value: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _metadata(path: Path) -> Made:
    """The content of a ``.metadata`` file."""

    def refuse(name: str) -> None:
        if name not in _NAMES:
            raise WeightsError(
                f"weights: {path} names {name}, which is nothing that torch.distributed.checkpoint writes there: "
                "it is damaged, or made to run code. Nothing of it was run"
            )

    with open(path, "rb") as file:
        data = file.read(MOST_METADATA + 1)
    try:
        if len(data) > MOST_METADATA:
            raise ValueError(f"it has more than {MOST_METADATA} bytes")
        metadata = unpickle(data, refuse=refuse)
        if not isinstance(metadata, Made) or metadata.maker != _KNOWN + "metadata.Metadata":
            raise ValueError("it holds something else")
        if not all(isinstance(metadata.field(name), dict) for name in ("state_dict_metadata", "storage_data")):
            raise ValueError("it names no tensors")
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"weights: {path} is no description of a checkpoint of torch.distributed.checkpoint, or it is damaged: "
            f"{str(error) or type(error).__name__}"
        ) from error
    return metadata


def distributed_tensors(folder: Path) -> TrainingState:
    """The tensors of a folder that ``dcp.save`` wrote, by the names there.

    Values that are no tensors are left out.

    Raises:
        WeightsError: the folder is damaged; the message names the file and the tensor.
    """
    path = folder / METADATA
    metadata = _metadata(path)
    stored: dict[tuple[Any, Any], Made] = {}
    for index, info in metadata.field("storage_data").items():
        if not isinstance(index, Made) or not isinstance(info, Made):
            raise WeightsError(f"weights: {path} says wrongly where its tensors lie: it is damaged")
        stored[index.field("fqn"), index.field("offset")] = info
    files: dict[Any, WeightFile] = {}
    tensors = TrainingState()
    for name, entry in metadata.field("state_dict_metadata").items():
        if not isinstance(entry, Made) or not isinstance(name, str):
            raise WeightsError(f"weights: {path} describes {name!r} wrongly: it is damaged")
        if entry.maker == _KNOWN + "metadata.TensorStorageMetadata":
            tensors[name] = _tensor(path, name, entry, stored, files)
    return tensors


def _tensor(
    path: Path, name: str, entry: Made, stored: dict[tuple[Any, Any], Made], files: dict[Any, WeightFile]
) -> TensorSource:
    """A tensor that ``.metadata`` describes."""
    properties, shape, boxes = entry.field("properties"), entry.field("size"), entry.field("chunks")
    told = properties.state if isinstance(properties, Made) else None
    dtype = told.get("dtype") if isinstance(told, dict) else told[0] if isinstance(told, tuple) and told else None
    if not isinstance(dtype, torch.dtype) or not _is_size(shape) or not isinstance(boxes, list):
        raise WeightsError(f"weights: {path} describes {name} wrongly: it is damaged")
    chunks = []
    for box in boxes:
        first, sizes = (box.field("offsets"), box.field("sizes")) if isinstance(box, Made) else (None, None)
        if not _is_size(first) or not _is_size(sizes) or not len(first) == len(sizes) == len(shape):
            raise WeightsError(f"weights: {path} describes the parts of {name} wrongly: it is damaged")
        if 0 not in sizes:
            info = stored.get((name, first))
            if info is None:
                raise WeightsError(f"weights: {path} does not say where the part of {name} at {first} lies")
            chunks.append(_chunk(path, name, (first, sizes), dtype, info, files))
    return chunked_tensor(name, path, shape, dtype, chunks)


def _chunk(
    path: Path, name: str, box: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, info: Made,
    files: dict[Any, WeightFile],
) -> Chunk:  # fmt: skip
    """A part of a tensor, which is looked for in its file when it is first needed."""
    relative, start, length = (info.field(field) for field in ("relative_path", "offset", "length"))
    if info.field("transform_descriptors"):
        raise WeightsError(
            f"weights: {name} in {path.parent} was written through the extension {info.field('transform_descriptors')} "
            "of torch.distributed.checkpoint, which autotp cannot undo: save it without"
        )
    if not isinstance(relative, str) or relative not in files:
        files[relative] = WeightFile.at(file_in(path.parent, relative, f"{path} (for {name})"))
    file, sizes = files[relative], box[1]
    if not _is_size((start, length)) or start + length > file.size:
        raise WeightsError(
            f"weights: {file.path} ends before {name}, of which it has a part at {start}: it is cut short. Copy or "
            "save it again"
        )

    def locate() -> FileTensor:
        tensor = _located(file, name, start, length)
        if not isinstance(tensor, FileTensor) or (tensor.shape, tensor.dtype) != (sizes, dtype):
            raise WeightsError(
                f"weights: {file.path} has at {start} something else than the part of {name} with shape {sizes} and "
                f"{dtype} that {path.name} says is there"
            )
        return tensor

    return Chunk(tuple((a, a + n) for a, n in zip(*box, strict=True)), (str(file.path), start), locate)


def _located(file: WeightFile, name: str, start: int, length: int) -> Any:
    """The content of a file at an offset: an archive of ``torch.save``'s, or an entry of a safetensors file."""
    with open(file.path, "rb") as opened:
        opened.seek(start)
        if opened.read(4) == ZIP:
            return read_saved(file, start, length)
        opened.seek(8)
        if opened.read(1) == b"{":
            return safetensors_tensors(file).get(name)
    raise WeightsError(f"weights: {file.path} has at {start} no part of {name} as torch.save or safetensors writes it")


def parts_in_safetensors(folder: Path, paths: Iterable[Path]) -> TrainingState | None:
    """The tensors of which ``HuggingFaceStorageWriter`` wrote parts into several files; None if it did not.

    Raises:
        WeightsError: files are damaged, or parts are missing.
    """
    boxes: dict[str, list[tuple[FileTensor, tuple[int, ...]]]] = {}
    for path in sorted(paths):
        parts = saved_offsets(WeightFile.at(path))
        if parts is None:
            return None
        for name, part in parts.items():
            boxes.setdefault(name, []).append(part)
    tensors = TrainingState()
    for name, entries in boxes.items():
        tensor = entries[0][0]
        if len({(len(t.shape), t.dtype) for t, _ in entries}) > 1:
            raise WeightsError(f"weights: the parts of {name} in {folder} are of several dtypes, or numbers of dims")
        shape = [max(at[d] + t.shape[d] for t, at in entries) for d in range(len(tensor.shape))]
        chunks = [
            Chunk(tuple((a, a + n) for a, n in zip(at, t.shape, strict=True)), t.position, _always(t))
            for t, at in entries
        ]
        tensors[name] = chunked_tensor(name, folder, shape, tensor.dtype, chunks)
    return tensors or None


def _always(tensor: FileTensor) -> Callable[[], FileTensor]:
    return lambda: tensor
