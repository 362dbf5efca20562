"""rank_graph: one rank's graph over the model's own parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from autotp.program.graph_text import graph_text
from autotp.program.lowered_graph import LoweredGraph
from autotp.program.sharded_program import ShardedProgram
from autotp.program.weight_binding import WeightBinding
from passes import Lowering, localize

__all__ = ["RankGraph"]


class RankGraph(fx.GraphModule):
    """The program of one rank: an fx graph over the model's own parameters, buffers and modules.

    It shares the dicts in which the model keeps them, so that it sees later assignments to the model. ``print`` it to
    read it: each line is commented with the value's type and layout.

    Attributes:
        note: text for the title: which of a module's graphs it is.
    """

    note: str = ""

    def __init__(self, program: ShardedProgram, rank: int, model: nn.Module) -> None:
        super().__init__(nn.Module(), fx.Graph())
        self.__dict__ |= {k: model.__dict__[k] for k in ("_modules", "_parameters", "_buffers")}
        captured = program.captured
        self.__dict__ |= captured.constants | captured.regions
        self.rank, self.tp = rank, program.tp
        self.graph = localize(program.graph, rank)
        self._lowering_inputs = captured.constants, captured.regions, captured.outputs.written
        self.__dict__["_model"] = model  # not a submodule: the graph shares its dicts
        self._lowered: dict[tuple[Lowering, bool], LoweredGraph] = {}
        self._bound: dict[tuple[bool, bool], tuple[LoweredGraph, WeightBinding]] = {}

    def lowered(self, lowering: Lowering, grad: bool) -> LoweredGraph:
        """The lowered program, made at the first request.

        Args:
            lowering: the passes to run.
            grad: whether a backward follows.
        """
        key = lowering, grad
        if key not in self._lowered:
            self._lowered[key] = LoweredGraph(self.graph, self.rank, *self._lowering_inputs, lowering, grad)
        return self._lowered[key]

    def execute(
        self,
        lowering: Lowering,
        tensors: Sequence[torch.Tensor],
        seen: Any = None,
        compiled: Mapping[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        """Run the lowered program on the model's weights.

        Args:
            lowering: the passes to run; the same in every call.
            tensors: the inputs, as this rank holds them.
            seen: the same object as in the last call if no weight has been replaced or moved since; None: unknown.
            compiled: options for ``torch.compile``; None: the program runs as it is.
        """
        key = torch.is_grad_enabled(), compiled is not None
        if key not in self._bound:
            self._bind(lowering, key, compiled)
        graph, binding = self._bound[key]
        weights = binding.take(seen)
        if weights is None:  # weights to merge differ in dtype, device or layout
            self._bind(replace(lowering, merge=False), key, compiled)
            return self.execute(lowering, tensors, seen, compiled)
        results: tuple[Any, ...] = graph.run(*tensors, *weights)
        return results

    def _bind(self, lowering: Lowering, key: tuple[bool, bool], compiled: Mapping[str, Any] | None) -> None:
        if compiled is None:
            graph = self.lowered(lowering, key[0])
        else:
            graph = LoweredGraph(self.graph, self.rank, *self._lowering_inputs, lowering, key[0], compiled)
        self._bound[key] = graph, WeightBinding(self._model, graph.weights, compiled is not None)

    def __str__(self) -> str:
        return graph_text(self.graph, f"rank {self.rank} of {self.tp}{self.note}", self.rank)
