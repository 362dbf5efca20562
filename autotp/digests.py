"""digests: short numbers for texts and tensors, the same in every process."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["checksum", "digest"]

_MASK = (1 << 62) - 1


def digest(text: str) -> int:
    """62 bits of a text, the same in every process (unlike ``hash``).

    >>> digest("a") == digest("a")
    True
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & _MASK


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
