"""chunked_tensor: tensors of a checkpoint that are stored in several boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autotp.errors import WeightsError
from autotp.weights.tensor_source import Box, FileTensor, TensorSource, contiguous_strides

__all__ = ["Chunk", "ChunkedTensor", "chunked_tensor"]


class Chunk:
    """A part of a tensor, which is a box of it, and where its numbers lie.

    Args:
        box: the part.
        position: the file and the offset near which it lies.
        locate: finds the part in its file; it is called once, when the part is first needed.
    """

    def __init__(self, box: Box, position: tuple[str, int], locate: Callable[[], FileTensor]) -> None:
        self.box, self.position = box, position
        self._locate = locate
        self._located: FileTensor | None = None

    @property
    def tensor(self) -> FileTensor:
        """The part, as a tensor of a file."""
        if self._located is None:
            self._located = self._locate()
        return self._located


@dataclass(frozen=True)
class ChunkedTensor(TensorSource):
    """A tensor that is stored in several boxes."""

    chunks: tuple[Chunk, ...]

    @property
    def position(self) -> tuple[str, int]:
        """The position of the first box."""
        return min((chunk.position for chunk in self.chunks), default=("", 0))

    def parts(self, box: Box, out: torch.Tensor) -> Iterator[tuple[TensorSource, Box, torch.Tensor]]:
        """The boxes that overlap a region; the others are not looked for in their files."""
        for chunk in self.chunks:
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, chunk.box, strict=True)]
            if all(a < b for a, b in common):
                region = tuple((a - c, b - c) for (a, b), (c, _) in zip(common, chunk.box, strict=True))
                yield chunk.tensor, region, out[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box))]


def chunked_tensor(
    name: str, where: object, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[Chunk]
) -> ChunkedTensor:
    """A tensor of chunks that make it up: each element is in one of them.

    Args:
        name: the tensor's name, for messages.
        where: the file that says so, for messages.
        shape: the tensor's shape.
        dtype: its dtype.
        chunks: its chunks; empty ones are left out.

    Raises:
        WeightsError: they reach out of the tensor, overlap, or leave a gap.
    """
    chunks = [chunk for chunk in chunks if all(a < b for a, b in chunk.box)]
    for chunk in chunks:
        if len(chunk.box) != len(shape) or any(b > n for (_, b), n in zip(chunk.box, shape)):
            raise WeightsError(f"weights: {where} has a part {chunk.box} of {name}, whose shape is {tuple(shape)}")
    if sum(math.prod(b - a for a, b in chunk.box) for chunk in chunks) != math.prod(shape) or _overlap(chunks):
        raise WeightsError(
            f"weights: the parts of {name} in {where} do not make up a tensor of shape {tuple(shape)}: some are "
            "missing, or there twice. Copy or save it again"
        )
    return ChunkedTensor(tuple(shape), contiguous_strides(shape), dtype, tuple(chunks))


def _overlap(chunks: Sequence[Chunk]) -> bool:
    """Whether two boxes, none of which is empty, have an element in common."""
    if len(chunks) < 2:
        return False
    first, last = np.array([chunk.box for chunk in chunks]).transpose(2, 0, 1)
    return any(
        bool(np.all((first[i] < last[i + 1 :]) & (first[i + 1 :] < last[i]), axis=1).any())
        for i in range(len(chunks) - 1)
    )
