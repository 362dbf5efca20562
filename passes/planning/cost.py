"""cost: the hardware model by which a plan is chosen: the savings of splitting and its costs, in one unit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from passes.graphs import is_tensor, shape
from passes.layouts.axes import Size

__all__ = ["CostModel"]


@dataclass(frozen=True)
class CostModel:
    """Costs in floating-point operations of one forward pass.

    People want tensor parallelism for memory first, so the prices of communication are set low: a projection pair is
    split from a few dozen columns on, an embedding from a few hundred rows on. The model must get the *order* of
    alternatives right (a layer's heads against the residual stream), and for that only ratios count.

    Attributes:
        per_element: the cost of moving one element of an activation through a collective.
        per_collective: the cost of starting a collective.
        per_parameter: the cost of holding one parameter, beside computing with it.
        extent: the assumed extent of a symbolic dim (batch, sequence).
        scale: the assumed number of tokens, as a multiple of the captured inputs' tokens.
    """

    per_element: float = 32.0
    per_collective: float = 1e6
    per_parameter: float = 1024.0
    extent: int = 64
    scale: float = 1.0

    @staticmethod
    def of(graph: fx.Graph) -> CostModel:
        """The model for a graph, for about 4096 tokens: batch and sequence may both be symbolic, or one, or neither."""
        inputs = [n for n in graph.nodes if n.op == "placeholder" and is_tensor(n)]
        symbols = {x for n in inputs for size in shape(n) for x in size.symbols}
        if symbols:
            return CostModel(extent=64 if len(symbols) > 1 else 4096)
        tokens = [shape(n)[:-1] if n.meta["val"].is_floating_point() else shape(n) for n in inputs]
        most = max((CostModel().elements(sizes) for sizes in tokens), default=1)
        return CostModel(scale=max(1.0, 4096 / max(most, 1)))

    def activation(self, sizes: Iterable[Size]) -> float:
        """The number of elements of an activation of these sizes, at the assumed number of tokens."""
        return self.elements(sizes) * self.scale

    def elements(self, sizes: Iterable[Size]) -> int:
        """The number of elements of a value of these sizes."""
        total = 1
        for size in sizes:
            total *= size.number * self.extent ** len(size.symbols)
        return total

    def __str__(self) -> str:
        return (
            f"an element communicated costs {self.per_element:g} operations, a collective {self.per_collective:g}, "
            f"a parameter held {self.per_parameter:g}; batch and sequence count as {self.extent} each"
        )
