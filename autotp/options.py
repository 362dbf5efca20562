"""options: the choices of a user of ``parallelize`` that hold for all calls of a model, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from passes import Lowering

__all__ = ["TIMEOUT", "Options"]

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others, where the user does not say."""


@dataclass(frozen=True)
class Options:
    """Options of :func:`autotp.parallelize`, which describes each; ranks must agree in all of them.

    Attributes:
        timeout: how long a rank waits for the others.
        debug: whether ranks compare the values of inputs and of replicated parameters.
        strict: whether an unsplit weight worth splitting, or a graph break, is an error.
        check: True: an unproved graph is an error; ``"warn"``: a warning; False: nothing is proved.
        shared_memory: whether CPU ranks of one host communicate through mapped memory.
        symmetric_memory: whether GPUs of one host sum small tensors by torch's symmetric-memory kernel.
        broadcast_inputs: whether ranks whose inputs differ take rank 0's.
        lowering: the passes that make graphs faster.
        compile: options for ``torch.compile``; None: graphs are not compiled.
    """

    timeout: timedelta = TIMEOUT
    debug: bool = False
    strict: bool = False
    check: bool | str = False
    shared_memory: bool = True
    symmetric_memory: bool = False
    broadcast_inputs: bool = False
    lowering: Lowering = field(default_factory=Lowering)
    compile: Mapping[str, Any] | None = None

    def described(self) -> dict[str, object]:
        """The options by name, in words that are the same on every rank that chose the same."""
        compiled = {k: getattr(v, "__qualname__", v) for k, v in (self.compile or {}).items()}
        fast = f"{self.lowering}, {'compiled' if self.compile is not None else 'not compiled'} {compiled or ''}"
        plain = ("debug", "timeout", "strict", "check", "shared_memory", "symmetric_memory", "broadcast_inputs")
        return {name: getattr(self, name) for name in plain} | {"how graphs are made fast": fast}
