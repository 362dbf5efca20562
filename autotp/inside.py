"""inside: a submodule of what runs as one graph, called by itself, runs as a graph of its own.

Users and libraries call a model's submodules (``model.get_encoder()(ids)``, as ``generate`` does). Such a
submodule has its weights as the model has split them, and its calls are captured, rewritten and compared among
the ranks as the model's are; what it returns is whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from autotp.between import inside_of_python

if TYPE_CHECKING:
    from autotp.runtime import Whole

__all__ = ["Inside"]


class Inside:
    """What a submodule that holds shards carries: a runtime of its own, made when it is first needed.

    Args:
        outer: the runtime of the module that it is in.
        name: its name there.
        module: the submodule.

    Attributes:
        own_forward: the forward that was set on the submodule itself.
    """

    def __init__(self, outer: Whole, name: str, module: nn.Module) -> None:
        self.outer, self.name, self.module = outer, name, module
        self.own_forward = module.__dict__.get("forward")
        self._runtime: Whole | None = None

    @property
    def runtime(self) -> Whole:
        """The submodule's runtime."""
        if self._runtime is None:
            self._runtime = self.outer.inside(self.name, self.module)
        return self._runtime

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """This rank's part of a call of the submodule, and its own kind of output."""
        with inside_of_python():
            return self.runtime(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Inside:
        """What the submodule of a copy of the model carries."""
        outer, module = copy.deepcopy(self.outer, memo), copy.deepcopy(self.module, memo)
        if id(self) not in memo:
            copied = memo[id(self)] = Inside(outer, self.name, module)
            copied.own_forward = copy.deepcopy(self.own_forward, memo)
        return memo[id(self)]
