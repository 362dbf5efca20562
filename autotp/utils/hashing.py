"""hashing: hashes of texts, numbers and tensors, the same in every process."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["checksum", "combined", "integer_checksum", "preview", "stable_hash"]

_MASK = (1 << 62) - 1
_INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def stable_hash(text: str) -> int:
    """A hash of a text, of 62 bits, the same in every process (unlike ``hash``).

    >>> stable_hash("a") == stable_hash("a")
    True
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & _MASK


def combined(*numbers: Any, tensors: Sequence[torch.Tensor] = ()) -> int:
    """A hash of numbers, of 62 bits, the same in every process, and quicker than :func:`stable_hash`.

    Args:
        numbers: integers, and tuples of them, nested at will.
        tensors: integer tensors on the CPU, of which the values count, too.

    >>> combined(3, (1, 2)) == combined(3, (1, 2))
    True
    """
    if tensors:
        numbers += tuple([integer_checksum(x) for x in tensors])
    return hash(numbers) & _MASK  # Python salts hashes of texts in each process, but not those of numbers


def checksum(tensor: torch.Tensor) -> int:
    """A sum of 64 bits over a tensor's bytes, weighted by their positions; equal tensors have equal sums."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 4:
        flat = flat.clone()
    rest = flat.numel() % 4
    total = 0
    if rest:
        total, flat = int(flat[-rest:].sum()) + 1, flat[:-rest]
    words = flat.view(torch.int32)
    for start in range(0, words.numel(), 1 << 22):  # in pieces: int64 copies of a large weight would not fit
        piece = words[start : start + (1 << 22)].to(torch.int64)
        weights = torch.arange(1, piece.numel() + 1, device=piece.device) % 65521 + start % 65521
        total = (total * 1000003 + int((piece * weights).sum())) % (1 << 64)
    return total


def integer_checksum(tensor: torch.Tensor) -> int | None:
    """A quick checksum of a tensor of integers or booleans on the CPU; None for any other.

    Token ids and masks are such tensors; they are small, and cheap to compare at each call.
    """
    if tensor.dtype not in _INTEGERS or tensor.device.type != "cpu":
        return None
    return zlib.crc32(tensor.contiguous().numpy().data)


def preview(tensor: torch.Tensor) -> str:
    """The first elements of a tensor and its checksum, for messages.

    >>> preview(torch.arange(9))
    '0, 1, 2, 3, ... (checksum ...)'
    """
    first = ", ".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in tensor.detach().flatten()[:4].tolist())
    return f"{first}{', ...' if tensor.numel() > 4 else ''} (checksum {checksum(tensor):x})"
