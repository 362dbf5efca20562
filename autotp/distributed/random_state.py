"""random_state: read and set the states of random generators, and draw from a chosen one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, MutableMapping
from typing import TypeVar

import torch

from autotp.distributed.agreement import Agreement

__all__ = ["draw_from", "get_state", "rank_0_draws", "set_state"]

K = TypeVar("K")


class _Drawing(threading.local):
    from_rank_0: bool = False


_drawing = _Drawing()


def get_state(device: torch.device) -> torch.Tensor:
    """The state of torch's own generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_state(device: torch.device, state: torch.Tensor) -> None:
    """Set the state of torch's own generator of a device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextlib.contextmanager
def draw_from(streams: MutableMapping[K, torch.Tensor], key: K, device: torch.device, seed: int) -> Iterator[None]:
    """Let torch draw from the stream whose state is ``streams[key]``, new from ``seed``; then its own goes on."""
    own = get_state(device)
    if key not in streams:
        streams[key] = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(seed).get_state()
    set_state(device, streams[key])
    try:
        yield
    finally:
        streams[key] = get_state(device)
        set_state(device, own)


@contextlib.contextmanager
def rank_0_draws(agreement: Agreement, devices: Iterable[torch.device]) -> Iterator[None]:
    """Let all ranks draw the random numbers of rank 0; afterwards each other rank's own stream goes on."""
    if _drawing.from_rank_0:  # nested: the outer one restores the ranks' own states
        yield
        return
    own = {device: get_state(device) for device in devices}
    for device, state in zip(own, agreement.of_rank_0(list(own.values())), strict=True):
        set_state(device, state)
    _drawing.from_rank_0 = True
    try:
        yield
    finally:
        _drawing.from_rank_0 = False
        if agreement.mesh.rank:
            for device, state in own.items():
                set_state(device, state)
