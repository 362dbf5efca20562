"""checkpoint: the tensors of weight files and mappings, and reads of any region of one in pieces of bounded size.

Both file formats say where in the file each tensor lies, so its bytes are read from there. They go straight into the
tensor that keeps them if they have the same order there, else through a small buffer. No file is mapped: the pages of a
mapped file count as memory of each process that has them, and the ranks of one host would each hold all of them.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autotp.errors import WeightsError
from passes import Shards

__all__ = ["PIECE", "Reader", "Source", "TensorSource", "open_checkpoint"]

Source = str | Path | Mapping[str, Any]
"""Where weights come from."""
Box = tuple[tuple[int, int], ...]
"""A region of a tensor: for each dim its first index, and the index after its last."""

PIECE = 1 << 20
"""The most bytes of a checkpoint that are in memory at once, beside those that the model keeps."""
ROW = 16 << 10
"""The fewest bytes that are worth a read of their own, where unneeded bytes lie between them."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
           "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64"}  # fmt: skip
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files of a saved model, in the order in which transformers looks for them."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor of a checkpoint: its shape, strides and dtype, and a way to read it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def position(self) -> tuple[str, int]:
        """The position of the tensor; tensors are read in this order."""
        return "", 0

    def read_directly(self, reader: Reader, box: Box, out: torch.Tensor) -> bool:
        """Read a region into a tensor without conversion or more memory; False if that is impossible."""
        return False

    def read(self, reader: Reader, box: Box, out: torch.Tensor) -> None:
        """Read a region into a tensor of its shape, of any dtype, on any device."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileTensor(TensorSource):
    """A tensor in a file, with the offset of its first element in bytes."""

    path: Path
    offset: int

    @property
    def position(self) -> tuple[str, int]:
        """The file, and the offset."""
        return str(self.path), self.offset

    def read_directly(self, reader: Reader, box: Box, out: torch.Tensor) -> bool:
        """Read a region into a tensor without conversion, if both are contiguous."""
        if out.device.type != "cpu" or out.dtype != self.dtype or not out.is_contiguous():
            return False
        if not _is_contiguous(out.shape, self.stride):
            return False
        reader.fill(self.path, self._offset_of(box), out.view(-1).view(torch.uint8))
        return True

    def read(self, reader: Reader, box: Box, out: torch.Tensor) -> None:
        """Read a region through the reader's buffer."""
        raw = reader.buffer(self.dtype.itemsize * _span(box, self.stride))
        reader.fill(self.path, self._offset_of(box), raw)
        out.copy_(raw.view(self.dtype).as_strided(out.shape, self.stride))

    def _offset_of(self, box: Box) -> int:
        first = sum(a * s for (a, _), s in zip(box, self.stride, strict=True))
        return self.offset + self.dtype.itemsize * first


@dataclass(frozen=True)
class MappingTensor(TensorSource):
    """A value of a mapping: a tensor, or an object that can be sliced like one."""

    value: Any

    def read(self, reader: Reader, box: Box, out: torch.Tensor) -> None:
        """Read a region."""
        out.copy_(torch.as_tensor(self.value[tuple(slice(a, b) for a, b in box)]).detach())


class Reader:
    """Reads regions of a checkpoint's tensors; it keeps one file open, and a buffer.

    >>> with Reader() as reader:
    ...     reader.read_shard(source, {}, 0, out)
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._file: FileIO | None = None
        self._path: Path | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._path = None

    def buffer(self, count: int) -> torch.Tensor:
        """Memory for ``count`` bytes that are read and then converted."""
        if self._buffer.numel() < count:
            self._buffer = torch.empty(max(count, PIECE), dtype=torch.uint8)
        return self._buffer[:count]

    def fill(self, path: Path, offset: int, out: torch.Tensor) -> None:
        """Fill memory with a file's bytes from an offset on."""
        if not out.numel():
            return
        if self._file is None or path != self._path:
            self.__exit__()
            self._file, self._path = FileIO(path), path
        self._file.seek(offset)
        rest = memoryview(out.numpy().data)
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise WeightsError(f"{path} ends {len(rest)} bytes too early: copy or save it again")
            rest = rest[count:]

    def read_shard(self, source: TensorSource, shards: Mapping[int, Shards], rank: int, out: torch.Tensor) -> None:
        """Read a rank's shard of a tensor.

        Args:
            source: the tensor.
            shards: its split dims.
            rank: the rank.
            out: a tensor of the shard's shape.
        """
        most, row = (max(n // source.dtype.itemsize, 1) for n in (PIECE, ROW))
        runs = [shards[d].ranks[rank].runs if d in shards else ((0, n),) for d, n in enumerate(source.shape)]
        for combination in itertools.product(*map(_with_starts, runs)):
            box = tuple(run for run, _ in combination)
            target = out[tuple(slice(start, start + b - a) for (a, b), start in combination)]
            if not target.numel() or source.read_directly(self, box, target):
                continue
            for piece in _pieces(box, source.stride, most, row):
                within = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(piece, box, strict=True))
                source.read(self, piece, target[within])


def _with_starts(runs: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    """Runs of indices, each with its position in the shard."""
    starts = itertools.accumulate((b - a for a, b in runs), initial=0)
    return list(zip(runs, starts))


def _is_contiguous(sizes: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a region of some sizes has no gaps, and its elements in order."""
    expected = 1
    for n, s in zip(reversed(sizes), reversed(stride), strict=True):
        if n != 1 and s != expected:
            return False
        expected *= n
    return True


def _span(box: Box, stride: Sequence[int]) -> int:
    """The number of a file's elements from the first to the last one of a region."""
    return 1 + sum((b - a - 1) * s for (a, b), s in zip(box, stride, strict=True))


def _pieces(box: Box, stride: Sequence[int], most: int, row: int) -> Iterator[Box]:
    """Split a region into pieces that each span ``most`` elements at most.

    Where the region is less than half of its span, rows of ``row`` elements or more become pieces of their own.
    """
    span, count = _span(box, stride), math.prod(b - a for a, b in box)
    outer = max((d for d, (a, b) in enumerate(box) if b - a > 1), key=lambda d: stride[d], default=None)
    if outer is None:
        yield box
        return
    start, stop = box[outer]
    inner = span - (stop - start - 1) * stride[outer]
    sparse = 2 * count < span and inner >= row
    if span <= most and not sparse:
        yield box
        return
    step = 1 if sparse or inner > most else (most - inner) // max(stride[outer], 1) + 1
    for a in range(start, stop, step):
        yield from _pieces((*box[:outer], (a, min(a + step, stop)), *box[outer + 1 :]), stride, most, row)


def open_checkpoint(weights: Source) -> dict[str, TensorSource]:
    """The tensors of a checkpoint, by name; no tensor is read, only the files' descriptions of them.

    Args:
        weights: a ``.safetensors`` file, a state dict's file that ``torch.save`` wrote, a folder in which transformers
            has saved a model, or a mapping. A mapping's values are tensors, or objects with a shape and a dtype that
            return a region when sliced.

    Raises:
        WeightsError: it is none of these; the message says what it is.
    """
    if isinstance(weights, Mapping):
        return {name: _from_value(name, value) for name, value in weights.items()}
    if not isinstance(weights, (str, Path)):
        raise WeightsError(f"weights is a path or a mapping from names to tensors, not a {type(weights).__name__}")
    path = Path(weights)
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise WeightsError(f"weights: there is no file or folder {path}")
    return _from_index(path) if path.name.endswith(".index.json") else dict(_from_file(path))


def _from_value(name: str, value: Any) -> MappingTensor:
    try:
        shape = tuple(int(n) for n in value.shape)
        dtype = value.dtype if isinstance(value.dtype, torch.dtype) else _torch_dtype(value.dtype)
    except (AttributeError, TypeError):
        raise WeightsError(f"weights: {name} is a {type(value).__name__}, not a tensor: leave it out") from None
    strides = value.stride() if isinstance(value, torch.Tensor) else _strides(shape)
    return MappingTensor(shape, tuple(strides), dtype, value)


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _from_folder(folder: Path) -> dict[str, TensorSource]:
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        content = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise WeightsError(f"weights: {folder} has none of {', '.join(_FILES)}, but {content}: pass the file")
    return _from_index(file) if file.suffix == ".json" else dict(_from_file(file))


def _from_index(index: Path) -> dict[str, TensorSource]:
    try:
        file_of = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"weights: {index} is no index of a checkpoint: it has no weight_map") from None
    files = {}
    for name in sorted(set(file_of.values())):
        if not (index.parent / name).is_file():
            raise WeightsError(f"weights: {index} names {name}, which is not there")
        files[name] = _from_file(index.parent / name)
    for name, file in file_of.items():
        if name not in files[file]:
            raise WeightsError(f"weights: {index} says that {name} is in {file}, which has no such tensor")
    return {name: files[file][name] for name, file in file_of.items()}


def _from_file(path: Path) -> dict[str, FileTensor]:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    return _from_state_dict(path) if is_zip else _from_safetensors(path)


def _from_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file.

    It begins with the length of a JSON text, then the text. That has each tensor's dtype and shape, and the offsets of
    its first byte and of the byte after its last, counted from the text's end.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > size:
                raise ValueError
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {}
            for name, entry in header.items():
                shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
                dtype = getattr(torch, _DTYPES.get(entry["dtype"], ""), None)
                if dtype is None:
                    raise WeightsError(
                        f"weights: {name} in {path} is of {entry['dtype']}, which torch has no dtype for; quantized "
                        "weights are of such types: pass weights that are not quantized"
                    )
                if end - start != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                    raise WeightsError(f"weights: {path} is cut short or damaged at {name}: copy or save it again")
                tensors[name] = FileTensor(shape, _strides(shape), dtype, path, 8 + length + start)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightsError(
                f"weights: {path} is neither a safetensors file nor one that torch.save has written since torch 1.6: "
                "load it and pass the mapping from names to tensors"
            ) from None
    return tensors


def _storage_offsets(path: Path) -> Callable[[int], int]:
    """A function that returns the offset of the first, second, ... storage in a file of ``torch.save``'s.

    Raises:
        ValueError: the file does not hold the storages' bytes as they are in memory.
    """
    file: Any = torch._C.PyTorchFileReader(str(path))
    if file.has_record("byteorder") and file.get_record("byteorder") != sys.byteorder.encode():
        raise ValueError("its numbers are in another order of bytes than this machine's")
    with zipfile.ZipFile(path) as entries:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.infolist()):
            raise ValueError("it is compressed")
    offset: Callable[[str], int] = file.get_record_offset
    return lambda number: offset(f"data/{number}")


def _from_state_dict(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file that ``torch.save`` wrote; torch loads it as fake tensors, without their content."""
    try:
        storage_offset = _storage_offsets(path)
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"weights: torch cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"weights: {path} holds a {type(state).__name__}, not a state dict")
    tensors, others, storages, as_saved = {}, [], dict[int, int](), True
    for name, t in state.items():
        plain = isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_conj() and not t.is_neg()
        offset = getattr(t.untyped_storage(), "_checkpoint_offset", None) if plain else None
        if offset is None:
            others.append(str(name))
            continue
        number = storages.setdefault(offset, len(storages))
        as_saved = as_saved and offset == storage_offset(number)  # torch computes its offset, and does not check it
        start = offset + t.storage_offset() * t.element_size()
        tensors[name] = FileTensor(tuple(t.shape), tuple(t.stride()), t.dtype, path, start)
    if others:
        raise WeightsError(
            f"weights: {path} has entries that are no plain tensors: {', '.join(others[:8])}. Pass the mapping from "
            "names to tensors that is in it, as torch.load(..., mmap=True) returns it"
        )
    if not as_saved:
        raise WeightsError(
            f"weights: {path} was packed by something else than torch.save, and its tensors are not where torch.save "
            "puts them: load it and pass the mapping from names to tensors"
        )
    return tensors
