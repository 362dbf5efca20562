"""device: the device that a model computes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

__all__ = ["compute_device", "computing_on", "device_of"]

_destination: ContextVar[torch.device | None] = ContextVar("_destination", default=None)


@contextlib.contextmanager
def computing_on(device: torch.device | None) -> Iterator[None]:
    """Treat models as if they were on the device that their weights move to later; None: on their own device."""
    token = _destination.set(device)
    try:
        yield
    finally:
        _destination.reset(token)


def compute_device(device: torch.device) -> torch.device:
    """The device that tensors of a device will be computed on; the CPU for tensors on the meta device."""
    if (destination := _destination.get()) is not None:
        return destination
    return torch.device("cpu") if device.type == "meta" else device


def device_of(model: nn.Module) -> torch.device:
    """The device that a model computes on; the CPU for a model on the meta device."""
    tensor = next(iter(model.parameters()), None)
    return compute_device(tensor.device if tensor is not None else torch.device("cpu"))
