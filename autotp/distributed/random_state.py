"""random_state: random numbers that all ranks draw from rank 0's state."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

import torch

from autotp.distributed.agreement import Agreement

__all__ = ["rank_0_draws"]


class _Drawing(threading.local):
    alike: bool = False


_drawing = _Drawing()


def _state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextlib.contextmanager
def rank_0_draws(agreement: Agreement, devices: Iterable[torch.device]) -> Iterator[None]:
    """torch's random numbers as rank 0 draws them, on all ranks; afterwards the others' are as they were before."""
    if _drawing.alike:  # in another one, at whose end the ranks' own are restored
        yield
        return
    own = {device: _state(device) for device in devices}
    for device, state in zip(own, agreement.of_rank_0(list(own.values())), strict=True):
        _restore(device, state)
    _drawing.alike = True
    try:
        yield
    finally:
        _drawing.alike = False
        if agreement.mesh.rank:
            for device, state in own.items():
                _restore(device, state)
