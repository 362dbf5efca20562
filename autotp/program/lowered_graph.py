"""lowered_graph: the program that a rank really runs, and the names of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from autotp.program.compilation import Region, can_be_compiled, can_repeat, compile_graph
from autotp.program.graph_text import lowered_text
from passes import Lowering, lower

__all__ = ["LoweredGraph"]


class LoweredGraph(fx.GraphModule):
    """A rank's program as it runs: an fx graph whose inputs are the call's tensors and then the weights.

    ``print`` it to read it: each line is commented with the value's local shape.

    Args:
        graph: the rank's rewritten graph.
        rank: the rank.
        constants: the graph's own tensors, by name.
        regions: the modules that the graph calls, by name.
        written: the results that are written into the memory of an input, by the input's number.
        lowering: which passes run.
        grad: whether a backward follows.
        compiled: options for ``torch.compile``; None: the graph runs as it is.

    Attributes:
        run: runs the program.
        weights: for each input after the call's tensors the name of its weight, or the names of weights merged into it.
        found: how many matches each pass found.
        repeated: the subgraphs that the graph calls several times, by name.
    """

    def __init__(
        self,
        graph: fx.Graph,
        rank: int,
        constants: Mapping[str, torch.Tensor],
        regions: Mapping[str, nn.Module],
        written: Mapping[int, int],
        lowering: Lowering,
        grad: bool,
        compiled: Mapping[str, Any] | None = None,
    ) -> None:
        lowered, flat = None, replace(lowering, repeat=False)
        if compiled is not None:  # a compiler plans memory and order
            repeat = lowering.repeat and can_repeat(graph, compiled)
            off = dict.fromkeys(("rematerialize", "cache_in_place", "overlap", "reuse", "direct_calls"), False)
            as_is = replace(lowering, repeat=repeat, **off)
            lowered = lower(graph, rank, constants, regions, as_is, grad=grad)
        if lowered is None or not can_be_compiled(lowered):
            compiled = None
            lowered = lower(graph, rank, constants, regions, flat, grad=grad, written=written)
        repeated = {name: Region(subgraph) for name, subgraph in lowered.repeated.items()}
        super().__init__({**lowered.constants, **regions, **repeated}, lowered.graph)
        self.weights, self.found, self.repeated, self.grad = lowered.weights, lowered.found, lowered.repeated, grad
        self.run: Callable[..., Any] = self.forward
        if compiled is not None:

            def without_regions() -> Callable[..., Any]:
                return LoweredGraph(graph, rank, constants, regions, written, flat, grad, compiled).run

            self.run = compile_graph(self, grad, compiled, without_regions if repeated else None)

    def __str__(self) -> str:
        kind = "with a backward" if self.grad else "forward only"
        title = f"lowered, {kind}: {', '.join(f'{n} {c}' for n, c in self.found.items() if c)}"
        return lowered_text(self.graph, title, self.repeated)
