"""write_shard: write what one rank holds of a dense tensor to where it belongs in a file.

The indices that a rank holds say which bytes of the dense tensor they are. So each rank writes its own, and no rank
gathers any. What several ranks hold is written once: split indices by the lowest rank that holds them, replicated
tensors by all ranks, each a part.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping

import torch

from autotp.weights.shard_tensor import Sharding
from passes import Shards

__all__ = ["PIECE", "write_shard"]

PIECE = 16 << 20
"""The most bytes of a tensor that are copied to be written, where they are not contiguous in memory on the CPU."""


def write_shard(file: int, offset: int, tensor: torch.Tensor, shards: Mapping[int, Shards], rank: int, tp: int) -> int:
    """Write this rank's part of a dense tensor.

    Args:
        file: the file's descriptor.
        offset: the position of the dense tensor's first byte in the file.
        tensor: this rank's shard.
        shards: the dense tensor's split dims.
        rank: this rank.
        tp: the number of ranks.

    Returns:
        The number of bytes written.

    Raises:
        OSError: the file system refuses; the disk is full.
    """
    tensor = tensor.detach()
    if not shards:
        first, stop = tensor.numel() * rank // tp, tensor.numel() * (rank + 1) // tp
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)
        return _write(file, offset + first * tensor.dtype.itemsize, flat[first:stop])
    ((dim, split),) = shards.items()
    sharding = Sharding(rank, dim, split)
    row = math.prod(tensor.shape[dim + 1 :]) * tensor.dtype.itemsize
    written = 0
    for first, _ in sharding.owned:
        start, count = sharding.chunks[first]
        part = tensor.narrow(dim, start, count)
        for i, rows in enumerate(_rows(part, dim)):
            written += _write(file, offset + (i * split.size + first) * row, rows)
    return written


def _rows(part: torch.Tensor, dim: int) -> Iterator[torch.Tensor]:
    """The regions of a tensor that are contiguous in the dense one: of all dims before ``dim`` one index each.

    Regions are copied in pieces where they are not contiguous on the CPU.
    """
    flat = part.flatten(0, dim - 1) if dim else part.unsqueeze(0)  # a view: the split dim is not touched
    if flat.device.type == "cpu":
        yield from flat
        return
    step = max(1, PIECE // max(1, flat[:1].nbytes))
    for first in range(0, len(flat), step):
        yield from flat[first : first + step].cpu()


def _write(file: int, offset: int, tensor: torch.Tensor) -> int:
    """Write a tensor's elements in order; returns the number of bytes."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        if tensor.nbytes > PIECE and tensor.dim() and len(tensor) > 1:
            half = len(tensor) // 2
            first = _write(file, offset, tensor[:half])
            return first + _write(file, offset + first, tensor[half:])
        tensor = tensor.contiguous().cpu()
    if not tensor.numel():
        return 0
    rest = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    size = len(rest)
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count
    return size
