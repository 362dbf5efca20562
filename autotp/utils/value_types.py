"""value_types: which kind a value is: a constant, a DTensor, an instance of a class by name."""

from __future__ import annotations

import enum
import sys
from typing import Any

import torch

__all__ = ["DTENSOR", "is_a", "is_constant"]

DTENSOR = "torch.distributed.tensor.DTensor"


def is_a(value: Any, path: str) -> bool:
    """Whether a value is an instance of a class of torch, without importing its module: that takes seconds.

    >>> is_a(model, "torch.distributed.fsdp.FullyShardedDataParallel")
    """
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(value, found)


_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(...), enum.Enum, torch.dtype, torch.device,
              torch.layout, torch.memory_format, torch.Size, slice, range)  # fmt: skip


def is_constant(x: Any) -> bool:
    """Whether an argument that is no tensor is all that its text says."""
    return isinstance(x, _CONSTANTS)
