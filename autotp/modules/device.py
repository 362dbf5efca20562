"""device: the device that a model computes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

__all__ = ["compute_device", "computing_on", "device_of"]


_headed: ContextVar[torch.device | None] = ContextVar("_headed", default=None)


@contextlib.contextmanager
def computing_on(device: torch.device | None) -> Iterator[None]:
    """Take models for being on a device already, to which their weights go later; None: take them as they are."""
    token = _headed.set(device)
    try:
        yield
    finally:
        _headed.reset(token)


def compute_device(device: torch.device) -> torch.device:
    """Where that will be computed which is on a device now; what is on the meta device, on the CPU."""
    if (headed := _headed.get()) is not None:
        return headed
    return torch.device("cpu") if device.type == "meta" else device


def device_of(model: nn.Module) -> torch.device:
    """The device a model computes on; the CPU for a model on the meta device."""
    tensor = next(iter(model.parameters()), None)
    return compute_device(tensor.device if tensor is not None else torch.device("cpu"))
