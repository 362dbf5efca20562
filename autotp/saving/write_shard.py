"""write_shard: write what one rank holds of a dense tensor to where it belongs in a file.

The indices that a rank holds say which bytes of the dense tensor they are. So each rank writes its own, and no rank
gathers any. What several ranks hold is written once: split indices by the lowest rank that holds them, replicated
tensors by all ranks, each a part.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence

import torch

from autotp.weights.shard_tensor import Sharding
from passes import Shards

__all__ = ["PIECE", "write_shard"]

PIECE = 8 << 20
"""The most bytes of a tensor that are copied to be written, where they are not contiguous in memory on the CPU."""

Run = tuple[int, int, int]
"""Indices of the split dim: the first in the dense tensor, the first in the shard, how many."""


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
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if not shards:
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor
        first, stop = len(flat) * rank // tp, len(flat) * (rank + 1) // tp
        return _write(file, offset, flat.unsqueeze(0), len(flat), [(first, first, stop - first)])
    ((dim, split),) = shards.items()
    sharding = Sharding(rank, dim, split)
    rows = tensor.flatten(0, dim - 1) if dim else tensor.unsqueeze(0)
    return _write(file, offset, rows, split.size, [(first, *sharding.chunks[first]) for first, _ in sharding.owned])


def _write(file: int, offset: int, rows: torch.Tensor, size: int, runs: Sequence[Run]) -> int:
    """Write runs of each row, which are contiguous in the dense tensor.

    Args:
        file: the file's descriptor.
        offset: the position of the dense tensor's first byte in the file.
        rows: the shard, of the dims before the split one one, which may be of size 1; then the split one.
        size: the dense size of the split dim.
        runs: the indices of the split dim to write.

    Returns:
        The number of bytes written.
    """
    index = math.prod(rows.shape[2:]) * rows.dtype.itemsize
    written = 0
    for first, piece, held in _pieces(rows, runs):
        view = memoryview(piece.reshape(-1).view(torch.uint8).numpy().data) if piece.numel() else memoryview(b"")
        width, parts = piece.shape[1] * index, [(a * index, b * index, n * index) for a, b, n in held if n]
        for i in range(len(piece)):
            at, start = offset + (first + i) * size * index, i * width
            for target, source, count in parts:
                done = os.pwrite(file, view[start + source : start + source + count], at + target)
                while done < count:  # the system writes 2 GiB at most
                    rest = view[start + source + done : start + source + count]
                    done += os.pwrite(file, rest, at + target + done)
                written += count
    return written


def _pieces(rows: torch.Tensor, runs: Sequence[Run]) -> Iterator[tuple[int, torch.Tensor, Sequence[Run]]]:
    """The rows in pieces that are contiguous on the CPU: the number of a piece's first row, itself, its runs."""
    if rows.device.type == "cpu" and rows.is_contiguous():
        yield 0, rows, runs
    elif len(rows) > 1:
        step = max(1, PIECE // max(1, rows[:1].nbytes))
        for first in range(0, len(rows), step):
            yield first, rows[first : first + step].contiguous().cpu(), runs
    else:
        step = max(1, PIECE // max(1, rows[:, :1].nbytes))
        for first, start, count in runs:
            for done in range(0, count, step):
                length = min(step, count - done)
                yield 0, rows.narrow(1, start + done, length).contiguous().cpu(), [(first + done, 0, length)]
