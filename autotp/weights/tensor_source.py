"""tensor_source: tensors of a checkpoint, and reads of any region of one in pieces of bounded size.

A file says where in it each tensor lies, so its bytes are read from there. They go straight into the tensor that keeps
them if they have the same order there, else through a small buffer. No file is mapped: the pages of a mapped file count
as memory of each process that has them, and the ranks of one host would each hold all of them.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from autotp.errors import WeightsError
from passes import Shards

__all__ = ["PIECE", "Box", "FileTensor", "MappingTensor", "Reader", "TensorSource", "WeightFile", "contiguous_strides"]

Box = tuple[tuple[int, int], ...]
"""A region of a tensor: for each dim its first index, and the index after its last."""

PIECE = 1 << 20
"""The most bytes of a checkpoint that are in memory at once, beside those that the model keeps."""
ROW = 16 << 10
"""The fewest bytes that are worth a read of their own, where unneeded bytes lie between them."""
BLOCK = 16 << 20
"""The most bytes that one call of the operating system reads; between two of them progress is told."""


@dataclass(frozen=True)
class WeightFile:
    """A file as it was when it was first looked at: its path, its size, and when it was last written."""

    path: Path
    size: int
    written: int

    @classmethod
    def at(cls, path: Path) -> WeightFile:
        """The file at a path, as it is now."""
        status = os.stat(path)
        return cls(path, status.st_size, status.st_mtime_ns)

    def check(self, descriptor: int) -> None:
        """Raise if the file, which is open, has been written since it was looked at."""
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.written):
            raise WeightsError(
                f"weights: {self.path} was written while its weights were read: it had {self.size} bytes, and has "
                f"{status.st_size}. Load it when nothing writes it any more"
            )


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

    def parts(self, box: Box, out: torch.Tensor) -> Iterator[tuple[TensorSource, Box, torch.Tensor]]:
        """The stored tensors that make up a region, with the region of each that is needed, and where that goes."""
        yield self, box, out

    def read_directly(self, reader: Reader, box: Box, out: torch.Tensor) -> bool:
        """Read a region into a tensor without conversion or more memory; False if that is impossible."""
        return False

    def read(self, reader: Reader, box: Box, out: torch.Tensor) -> None:
        """Read a region into a tensor of its shape, of any dtype, on any device."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileTensor(TensorSource):
    """A tensor in a file, with the offset of its first element in bytes."""

    file: WeightFile
    offset: int

    @property
    def position(self) -> tuple[str, int]:
        """The file, and the offset."""
        return str(self.file.path), self.offset

    def read_directly(self, reader: Reader, box: Box, out: torch.Tensor) -> bool:
        """Read a region into a tensor without conversion, if both are contiguous."""
        if out.device.type != "cpu" or out.dtype != self.dtype or not out.is_contiguous():
            return False
        if not _is_contiguous(out.shape, self.stride):
            return False
        reader.fill(self.file, self._offset_of(box), out.view(-1).view(torch.uint8))
        return True

    def read(self, reader: Reader, box: Box, out: torch.Tensor) -> None:
        """Read a region through the reader's buffer."""
        raw = reader.buffer(self.dtype.itemsize * _span(box, self.stride))
        reader.fill(self.file, self._offset_of(box), raw)
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
        reader.advance(out.numel() * self.dtype.itemsize)


class Reader:
    """Reads regions of a checkpoint's tensors; it keeps one file open, and a buffer.

    Args:
        advance: is told the number of bytes after each read.

    >>> with Reader() as reader:
    ...     reader.read_shard(source, {}, 0, out)
    """

    def __init__(self, advance: Callable[[int], None] = lambda count: None) -> None:
        self.advance = advance
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._open: tuple[WeightFile, FileIO] | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._open is None:
            return
        (file, stream), self._open = self._open, None
        with stream:
            if not any(raised):
                file.check(stream.fileno())

    def buffer(self, count: int) -> torch.Tensor:
        """Memory for ``count`` bytes that are read and then converted."""
        if self._buffer.numel() < count:
            self._buffer = torch.empty(max(count, PIECE), dtype=torch.uint8)
        return self._buffer[:count]

    def fill(self, file: WeightFile, offset: int, out: torch.Tensor) -> None:
        """Fill memory with a file's bytes from an offset on."""
        if not out.numel():
            return
        if self._open is None or file != self._open[0]:
            self.__exit__()
            self._open = file, FileIO(file.path)
            file.check(self._open[1].fileno())
        stream = self._open[1]
        stream.seek(offset)
        rest = memoryview(out.numpy().data)
        while rest:
            count = stream.readinto(rest[:BLOCK])
            if not count:
                raise WeightsError(f"{file.path} ends {len(rest)} bytes too early: copy or save it again")
            self.advance(count)
            rest = rest[count:]

    def read_shard(self, source: TensorSource, shards: Mapping[int, Shards], rank: int, out: torch.Tensor) -> None:
        """Read a rank's shard of a tensor.

        Args:
            source: the tensor.
            shards: its split dims.
            rank: the rank.
            out: a tensor of the shard's shape.
        """
        runs = [shards[d].ranks[rank].runs if d in shards else ((0, n),) for d, n in enumerate(source.shape)]
        for combination in itertools.product(*map(_with_starts, runs)):
            box = tuple(run for run, _ in combination)
            target = out[tuple(slice(start, start + b - a) for (a, b), start in combination)]
            if target.numel():
                self.read_region(source, box, target)

    def read_region(self, source: TensorSource, box: Box, out: torch.Tensor) -> None:
        """Read a region of a tensor, which is not empty, into a tensor of its shape."""
        most, row = (max(n // source.dtype.itemsize, 1) for n in (PIECE, ROW))
        for part, region, target in source.parts(box, out):
            if part.read_directly(self, region, target):
                continue
            for piece in _pieces(region, part.stride, most, row):
                within = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(piece, region, strict=True))
                part.read(self, piece, target[within])


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


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
