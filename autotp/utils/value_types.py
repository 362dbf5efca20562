"""value_types: kinds of values: constants, how to compare them, instances of classes that may not be imported."""

from __future__ import annotations

import enum
import sys
from typing import Any

import torch

__all__ = ["BY_VALUE", "CONSTANTS", "DTENSOR", "SCALARS", "SINGLETONS", "is_a", "is_constant"]

DTENSOR = "torch.distributed.tensor.DTensor"


def is_a(value: Any, path: str) -> bool:
    """Whether a value is an instance of a class of torch, without importing its module: that takes seconds.

    >>> is_a(model, "torch.distributed.fsdp.FullyShardedDataParallel")
    """
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)


SCALARS = (bool, int, float, complex, str, bytes, type(None))
"""Plain Python values; equal ones may be one object."""

SINGLETONS = (type(None), bool, type(...), torch.dtype, torch.memory_format, torch.layout, enum.Enum, type)
"""Kinds of constants of which there is one object each, so that ``is`` compares them."""

BY_VALUE = (int, str, bytes, torch.device, torch.Size)
"""Kinds of constants that ``==`` compares; equal floats may differ in sign, and so do not belong here."""

CONSTANTS = (*SCALARS, type(...), enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
             slice, range)  # fmt: skip
"""Kinds of values that are told apart by their ``repr``."""


def is_constant(value: Any) -> bool:
    """Whether a value is a constant, for which a graph holds as it is."""
    return isinstance(value, CONSTANTS)
