"""registry: the parallelized models that are alive, for torch functions that see parameters only, not their model."""

from __future__ import annotations

import atexit
import itertools
import weakref
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import nn

from autotp.distributed.agreement import Agreement
from autotp.distributed.mesh import Mesh
from autotp.distributed.process_context import ProcessContext
from passes import Shards

__all__ = ["Sharded", "latest", "living", "register", "unregister"]


class Sharded(Protocol):
    """A parallelized model, as the functions on its parameters see it."""

    mesh: Mesh
    context: ProcessContext
    agreement: Agreement

    def placed(self) -> Iterable[tuple[str, nn.Parameter, Mapping[int, Shards]]]:
        """The name and split dims of each parameter, and the parameter; tied ones once."""
        ...

    def stepped(self) -> None:
        """Note that an optimizer is about to take a step on the parameters."""
        ...


_models: weakref.WeakValueDictionary[int, Sharded] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(model: Sharded) -> None:
    """Add a model, for as long as it lives."""
    _models[next(_numbers)] = model


def unregister(model: Sharded) -> None:
    """Take a model out that is no longer called, though it may live on."""
    for number in [n for n, other in _models.items() if other is model]:
        del _models[number]


def living() -> list[Sharded]:
    """The models that are alive, in the order of their creation, which is the same on every rank."""
    return [model for _, model in sorted(_models.items())]


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
