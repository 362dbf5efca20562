"""captured_graph: the graph of one call, its weights' dense shapes, and the sizes that it holds for."""

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
    """What capture must know of the dense model after its weights have been split: their shapes."""

    shapes: Mapping[str, torch.Size]

    @staticmethod
    def of(model: nn.Module) -> DenseShapes:
        """The shapes of a model's parameters as they are now, tied ones under each of their names."""
        return DenseShapes({n: p.shape for n, p in model.named_parameters(remove_duplicate=False)})


@dataclass
class CapturedGraph:
    """A captured model.

    Attributes:
        graph: the simplified graph; parameters and buffers are ``get_attr`` nodes on their fully
            qualified names, placeholders are the tensors among the flattened inputs.
        constants: tensors that the model's code made, by ``get_attr`` target.
        regions: submodules that the graph calls (regions under autocast), by ``get_attr`` target.
        parameters: the ``get_attr`` targets that are parameters.
        outputs: how to put the outputs back together from the graph's results.
        slots: for each input tensor that is in an object its place there.
        inputs: what the caller calls each input tensor.
        guards: conditions on sizes that the model's Python branched on: a function, and the
            ``(input, dim)`` of each of its arguments.
        static: ``(input, dim, size)`` for the input dims that the graph takes for constants.
        equal: ``(input, dim, input, dim)`` for the input dims that must be equal.
        steps: what was called, and the sizes of what it made in the call that was traced.
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
        """Whether inputs have the sizes that the graph takes for constants, for equal, or branched on."""
        if not all(check(*(shapes[i][d] for i, d in where)) for check, where in self.guards):
            return False
        return all(shapes[i][d] == n for i, d, n in self.static) and all(
            shapes[i][d] == shapes[j][e] for i, d, j, e in self.equal
        )
