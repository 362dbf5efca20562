"""captured_graph: the graph of one call, its size guards, and the dense shapes of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from autotp.arguments.object_tree import Slot
from autotp.capture.outputs import OutputSpec

__all__ = ["CapturedGraph", "DenseShapes"]


@dataclass(frozen=True)
class DenseShapes:
    """The shapes of a dense model's weights, which capture needs after the weights have been sharded."""

    shapes: Mapping[str, torch.Size]

    @staticmethod
    def of(model: nn.Module) -> DenseShapes:
        """The current shapes of a model's parameters, tied ones under each of their names."""
        return DenseShapes({n: p.shape for n, p in model.named_parameters(remove_duplicate=False)})


@dataclass
class CapturedGraph:
    """The graph of one captured call.

    Attributes:
        graph: the simplified graph; parameters and buffers are ``get_attr`` nodes on their fully
            qualified names, placeholders are the tensors among the flattened inputs.
        constants: the tensors that the model's code created, by ``get_attr`` target.
        regions: the submodules that the graph calls (regions under autocast), by ``get_attr`` target.
        parameters: the ``get_attr`` targets that are parameters.
        outputs: how to rebuild the outputs from the graph's results.
        slots: the slots of the input tensors that are in objects, by position.
        inputs: the caller's name of each input tensor.
        guards: the conditions on sizes that the model's Python branched on: for each a function, and the
            ``(input, dim)`` of each of its arguments.
        static: ``(input, dim, size)`` for each input dim that is a constant in the graph.
        equal: ``(input, dim, input, dim)`` for each two input dims that must be equal.
        steps: the ops of the traced call, and the sizes of their results.
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    regions: dict[str, nn.Module]
    parameters: set[str]
    outputs: OutputSpec
    slots: dict[int, Slot]
    inputs: list[str] = field(default_factory=list)
    guards: list[tuple[Any, tuple[tuple[int, int], ...]]] = field(default_factory=list)
    static: list[tuple[int, int, int]] = field(default_factory=list)
    equal: list[tuple[int, int, int, int]] = field(default_factory=list)
    steps: tuple[Any, ...] = ()

    def fits(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether inputs of these shapes satisfy all size guards, static dims and equal dims."""
        if not all(guard(*(shapes[i][d] for i, d in dims)) for guard, dims in self.guards):
            return False
        return all(shapes[i][d] == n for i, d, n in self.static) and all(
            shapes[i][d] == shapes[j][e] for i, d, j, e in self.equal
        )
