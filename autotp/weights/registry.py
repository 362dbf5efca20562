"""registry: the parallelized models that are alive, for what torch does to parameters without asking the model."""

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

__all__ = ["Sharded", "latest", "living", "register"]


class Sharded(Protocol):
    """A parallelized model, as far as its parameters are concerned."""

    mesh: Mesh
    context: ProcessContext
    agreement: Agreement

    def placed(self) -> Iterable[tuple[str, nn.Parameter, Mapping[int, Shards]]]:
        """Each parameter once: its name, itself, its split dims."""
        ...

    def stepped(self) -> None:
        """An optimizer is about to take a step on the parameters."""
        ...


_models: weakref.WeakValueDictionary[int, Sharded] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(model: Sharded) -> None:
    """Remember a model for as long as it lives."""
    _models[next(_numbers)] = model


def living() -> list[Sharded]:
    """The models in the order in which they were made, which is the same on every rank."""
    return [model for _, model in sorted(_models.items())]


@atexit.register
def _release() -> None:
    """Let process groups go while Python still runs: threads of theirs that return to an interpreter that has ended
    abort the process."""
    for model in living():
        model.agreement.release()
        model.context.release()


def latest() -> int:
    """A number that grows with every model; -1 where none is alive."""
    return max(_models, default=-1)
