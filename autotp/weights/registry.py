"""registry: the parallelized models that are alive, for torch functions that see parameters only, not their model."""

from __future__ import annotations

import atexit
import itertools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from autotp.distributed.agreement import Agreement
from autotp.distributed.mesh import Mesh
from autotp.distributed.process_context import ProcessContext
from autotp.utils.value_types import DTENSOR, is_a
from passes import Shards

__all__ = ["Sharded", "latest", "living", "memory_key", "register", "registered", "unregister"]


class Sharded(Protocol):
    """A parallelized model, as the functions on its parameters see it."""

    mesh: Mesh
    context: ProcessContext
    agreement: Agreement

    def placed(self) -> Iterable[tuple[str, nn.Parameter, Mapping[int, Shards]]]:
        """The name and split dims of each parameter, and the parameter; tied ones once."""
        ...

    def gather(self, local: torch.Tensor, shards: Mapping[int, Shards]) -> torch.Tensor:
        """The dense tensor of which each rank holds ``local``, by its split dims. Collective."""
        ...

    def stepped(self) -> None:
        """Note that an optimizer is about to take a step on the parameters."""
        ...


_models: weakref.WeakValueDictionary[int, Sharded] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_registered = 0


def register(model: Sharded) -> None:
    """Add a model, for as long as it lives."""
    global _registered
    _models[next(_numbers)] = model
    _registered += 1


def unregister(model: Sharded) -> None:
    """Take a model out that is no longer called, though it may live on."""
    for number in [n for n, other in _models.items() if other is model]:
        del _models[number]


def living() -> list[Sharded]:
    """The models that are alive, in the order of their creation, which is the same on every rank."""
    return [model for _, model in sorted(_models.items())]


def memory_key(t: torch.Tensor) -> Any:
    """A key that is equal for tensors with the same memory, such as ``p.grad`` and ``p.grad.detach()``."""
    plain = t.layout is torch.strided and not is_a(t, DTENSOR) and t.numel()
    return (t.data_ptr(), t.shape) if plain else id(t)


@atexit.register
def _release() -> None:
    """Drop process groups while Python still runs.

    Otherwise one of their threads may return to an interpreter that has ended, and that aborts the process.
    """
    for model in living():
        model.agreement.release()
        model.context.release()


def latest() -> int:
    """The number of the latest model that is alive; numbers grow, and -1 means that there is none."""
    return max(_models, default=-1)


def registered() -> int:
    """How many models have been added so far, dead ones too."""
    return _registered
