"""digests: short numbers for texts and tensors, the same in every process."""

from __future__ import annotations

import hashlib
import zlib

import torch

__all__ = ["checksum", "combined", "integer_checksum", "preview", "stable_hash"]

_MASK = (1 << 62) - 1
_WHOLE = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def stable_hash(text: str) -> int:
    """62 bits of a text, the same in every process (unlike ``hash``).

    >>> digest("a") == digest("a")
    True
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & _MASK


def combined(*numbers: int | tuple[int, ...]) -> int:
    """62 bits of numbers, the same in every process, and quicker than :func:`stable_hash`.

    >>> combined(3, (1, 2)) == combined(3, (1, 2))
    True
    """
    return hash(numbers) & _MASK  # of numbers, unlike texts, no process has a hash of its own


def checksum(tensor: torch.Tensor) -> int:
    """A 64-bit sum over a tensor's bytes, weighted by position; equal for equal tensors."""
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
    """A quick sum of a tensor of integers or truth values on the CPU; None for any other.

    Such are token ids and masks, small and cheap to compare at each call.
    """
    if tensor.dtype not in _WHOLE or tensor.device.type != "cpu":
        return None
    return zlib.crc32(tensor.contiguous().numpy().data)


def preview(tensor: torch.Tensor) -> str:
    """The beginning of a tensor, and its checksum, which differs where it does.

    >>> shown(torch.arange(9))
    '0, 1, 2, 3, ... (checksum ...)'
    """
    first = ", ".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in tensor.detach().flatten()[:4].tolist())
    return f"{first}{', ...' if tensor.numel() > 4 else ''} (checksum {checksum(tensor):x})"
