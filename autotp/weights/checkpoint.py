"""checkpoints: what files of weights hold, and any part of a weight, read in pieces of bounded size.

Both formats say where in the file each tensor lies, so its bytes are read from there, into the memory where
they stay if they lie as they do in the file, else by way of a small buffer. Nothing is mapped: pages of a mapped
file count as a process's memory for as long as it has them, and ranks of one host would each hold them all.
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
"""For each dim the first index of a part, and the one behind its last."""

PIECE = 1 << 20
"""Bytes of a checkpoint that are in memory at once, beside those that stay."""
ROW = 16 << 10
"""Bytes that are worth a read of their own, where what lies between them is not wanted."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
           "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64"}  # fmt: skip
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor of a checkpoint, and how far from each other its elements lie."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def place(self) -> tuple[str, int]:
        """Where it lies, in the order in which to read."""
        return "", 0

    def straight(self, reader: Reader, box: Box, out: torch.Tensor) -> bool:
        """Read a part into a tensor that can have its bytes as they are, without more memory; whether it can."""
        return False

    def read(self, reader: Reader, box: Box, out: torch.Tensor) -> None:
        """Read a part into a tensor of its shape, of any dtype, on any device."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileTensor(TensorSource):
    """A tensor in a file, its first element at an offset in bytes."""

    path: Path
    offset: int

    @property
    def place(self) -> tuple[str, int]:
        """The file, and the offset."""
        return str(self.path), self.offset

    def straight(self, reader: Reader, box: Box, out: torch.Tensor) -> bool:
        """Read a part as it is, if it has no gaps."""
        if out.device.type != "cpu" or out.dtype != self.dtype or not out.is_contiguous():
            return False
        if not _contiguous(out.shape, self.stride):
            return False
        reader.fill(self.path, self._start(box), out.view(-1).view(torch.uint8))
        return True

    def read(self, reader: Reader, box: Box, out: torch.Tensor) -> None:
        """Read a part by way of the reader's buffer."""
        raw = reader.buffer(self.dtype.itemsize * _span(box, self.stride))
        reader.fill(self.path, self._start(box), raw)
        out.copy_(raw.view(self.dtype).as_strided(out.shape, self.stride))

    def _start(self, box: Box) -> int:
        first = sum(a * s for (a, _), s in zip(box, self.stride, strict=True))
        return self.offset + self.dtype.itemsize * first


@dataclass(frozen=True)
class MappingTensor(TensorSource):
    """A tensor of a mapping, or what can be sliced like one."""

    value: Any

    def read(self, reader: Reader, box: Box, out: torch.Tensor) -> None:
        """Read a part."""
        out.copy_(torch.as_tensor(self.value[tuple(slice(a, b) for a, b in box)]).detach())


class Reader:
    """Reads parts of a checkpoint's tensors: it has one file open, and a buffer.

    >>> with Reader() as reader:
    ...     reader.part(stored, {}, 0, out)
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
        """Memory for bytes on their way."""
        if self._buffer.numel() < count:
            self._buffer = torch.empty(max(count, PIECE), dtype=torch.uint8)
        return self._buffer[:count]

    def fill(self, path: Path, offset: int, out: torch.Tensor) -> None:
        """Fill memory from a place in a file."""
        if not out.numel():
            return
        if self._file is None or path != self._path:
            self.__exit__()
            self._file, self._path = FileIO(path), path
        self._file.seek(offset)
        left = memoryview(out.numpy().data)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise WeightsError(f"{path} ends {len(left)} bytes too early: copy or save it again")
            left = left[count:]

    def part(self, source: TensorSource, shards: Mapping[int, Shards], rank: int, out: torch.Tensor) -> None:
        """Read a rank's share of a tensor.

        Args:
            source: the tensor.
            shards: its split dims.
            rank: the rank.
            out: a tensor of the share's shape.
        """
        most, row = (max(n // source.dtype.itemsize, 1) for n in (PIECE, ROW))
        runs = [_placed(shards[d].ranks[rank].runs if d in shards else ((0, n),)) for d, n in enumerate(source.shape)]
        for chosen in itertools.product(*runs):
            box = tuple(run for run, _ in chosen)
            there = out[tuple(slice(at, at + b - a) for (a, b), at in chosen)]
            if not there.numel() or source.straight(self, box, there):
                continue
            for piece in _pieces(box, source.stride, most, row):
                own = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(piece, box, strict=True))
                source.read(self, piece, there[own])


def _placed(runs: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    """Runs of indices, each with its first index's place among all of them."""
    starts = itertools.accumulate((b - a for a, b in runs), initial=0)
    return list(zip(runs, starts))


def _contiguous(sizes: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a part of some sizes has no gaps, and its elements in order."""
    wanted = 1
    for n, s in zip(reversed(sizes), reversed(stride), strict=True):
        if n != 1 and s != wanted:
            return False
        wanted *= n
    return True


def _span(box: Box, stride: Sequence[int]) -> int:
    """How many elements there are from the first to the last of a part."""
    return 1 + sum((b - a - 1) * s for (a, b), s in zip(box, stride, strict=True))


def _pieces(box: Box, stride: Sequence[int], most: int, row: int) -> Iterator[Box]:
    """A part in pieces, none of which spans more than ``most`` elements; rows of ``row`` or more by themselves, where
    they are less than half of what they lie in."""
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
    """What a checkpoint holds, by name; of a file, only what it says of itself is read.

    Args:
        weights: a ``.safetensors`` file, a file of a state dict that ``torch.save`` wrote, a folder in which
            transformers saves a model, or a mapping from names to tensors, or to what has a shape and a dtype and
            gives a part of itself when it is sliced.

    Raises:
        WeightsError: it is none of these; it says what was found.
    """
    if isinstance(weights, Mapping):
        return {name: _given(name, value) for name, value in weights.items()}
    if not isinstance(weights, (str, Path)):
        raise WeightsError(f"weights is a path or a mapping from names to tensors, not a {type(weights).__name__}")
    path = Path(weights)
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise WeightsError(f"weights: there is no file or folder {path}")
    return _in_index(path) if path.name.endswith(".index.json") else dict(_in_file(path))


def _given(name: str, value: Any) -> MappingTensor:
    try:
        shape = tuple(int(n) for n in value.shape)
        dtype = value.dtype if isinstance(value.dtype, torch.dtype) else _of_numpy(value.dtype)
    except (AttributeError, TypeError):
        raise WeightsError(f"weights: {name} is a {type(value).__name__}, not a tensor: leave it out") from None
    strides = value.stride() if isinstance(value, torch.Tensor) else _strides(shape)
    return MappingTensor(shape, tuple(strides), dtype, value)


def _of_numpy(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a tensor without gaps."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _in_folder(folder: Path) -> dict[str, TensorSource]:
    found = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if found is None:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise WeightsError(f"weights: {folder} has none of {', '.join(_FILES)}, but {there}: pass the file")
    return _in_index(found) if found.suffix == ".json" else dict(_in_file(found))


def _in_index(index: Path) -> dict[str, TensorSource]:
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"weights: {index} is no index of a checkpoint: it has no weight_map") from None
    files = {}
    for name in sorted(set(places.values())):
        if not (index.parent / name).is_file():
            raise WeightsError(f"weights: {index} names {name}, which is not there")
        files[name] = _in_file(index.parent / name)
    for name, file in places.items():
        if name not in files[file]:
            raise WeightsError(f"weights: {index} says that {name} is in {file}, which has no such tensor")
    return {name: files[file][name] for name, file in places.items()}


def _in_file(path: Path) -> dict[str, FileTensor]:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    return _in_state_dict(path) if is_zip else _in_safetensors(path)


def _in_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file that begins with the length of a JSON text, and the text: dtype, shape, first and last byte
    of each tensor, counted from the text's end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > size:
                raise ValueError
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {}
            for name, said in header.items():
                shape, (start, end) = tuple(said["shape"]), said["data_offsets"]
                dtype = getattr(torch, _DTYPES.get(said["dtype"], ""), None)
                if dtype is None:
                    raise WeightsError(
                        f"weights: {name} in {path} is of {said['dtype']}, which torch has no dtype for, as quantized "
                        "weights are: pass weights that are not quantized"
                    )
                if end - start != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                    raise WeightsError(f"weights: {path} is cut short or damaged at {name}: copy or save it again")
                found[name] = FileTensor(shape, _strides(shape), dtype, path, 8 + length + start)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightsError(
                f"weights: {path} is neither a safetensors file nor one that torch.save has written since torch 1.6: "
                "load it and pass the mapping from names to tensors"
            ) from None
    return found


def _records(path: Path) -> Callable[[int], int]:
    """Where in a file of ``torch.save``'s the bytes of its first, second, ... storage begin.

    Raises:
        ValueError: they are not there as they are in memory.
    """
    file: Any = torch._C.PyTorchFileReader(str(path))
    if file.has_record("byteorder") and file.get_record("byteorder") != sys.byteorder.encode():
        raise ValueError("its numbers are in another order of bytes than this machine's")
    with zipfile.ZipFile(path) as entries:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.infolist()):
            raise ValueError("it is compressed")
    offset: Callable[[str], int] = file.get_record_offset
    return lambda number: offset(f"data/{number}")


def _in_state_dict(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file that ``torch.save`` wrote, which torch reads without their content."""
    try:
        records = _records(path)
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"weights: torch cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"weights: {path} holds a {type(state).__name__}, not a state dict")
    found, other, seen, as_saved = {}, [], dict[int, int](), True
    for name, t in state.items():
        plain = isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_conj() and not t.is_neg()
        offset = getattr(t.untyped_storage(), "_checkpoint_offset", None) if plain else None
        if offset is None:
            other.append(str(name))
            continue
        as_saved = as_saved and offset == records(
            seen.setdefault(offset, len(seen))
        )  # torch reckons it, and does not look
        start = offset + t.storage_offset() * t.element_size()
        found[name] = FileTensor(tuple(t.shape), tuple(t.stride()), t.dtype, path, start)
    if other:
        raise WeightsError(
            f"weights: {path} has what is no plain tensor: {', '.join(other[:8])}. Pass the mapping from names to "
            "tensors that is in it, as torch.load(..., mmap=True) gives it"
        )
    if not as_saved:
        raise WeightsError(
            f"weights: {path} was packed by something else than torch.save, and its tensors do not lie where that puts "
            "them: load it and pass the mapping from names to tensors"
        )
    return found
