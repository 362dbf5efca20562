"""lowered: the program that a rank really runs, and the weights that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from autotp.program.compilation import Region, can_be_compiled, can_repeat
from autotp.program.compilation import compile_graph as as_compiled
from autotp.program.graph_text import lowered_text
from passes import Lowering, lower

__all__ = ["LoweredGraph"]


class LoweredGraph(fx.GraphModule):
    """A rank's program as it runs: an fx graph whose inputs are the call's tensors and then the weights.

    ``print`` it to read it: each line is commented with the value's local shape.

    Args:
        graph: the rank's rewritten graph.
        rank: the rank.
        constants: the tensors that the graph has.
        regions: the modules that it calls.
        written: the results that go back into the memory of an input, by its number.
        lowering: which passes run.
        grad: whether a backward follows.
        compiled: options for ``torch.compile``; None: the graph runs as it is.

    Attributes:
        run: runs it.
        weights: for each input after the call's tensors the names of the weights that it is.
        found: how much each pass found.
        repeated: the graphs of what it calls several times.
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
        made, flat = None, replace(lowering, repeat=False)
        if compiled is not None:  # a compiler plans memory and order
            repeat = lowering.repeat and can_repeat(graph, compiled)
            off = dict.fromkeys(("rematerialize", "cache_in_place", "overlap", "reuse", "direct_calls"), False)
            as_is = replace(lowering, repeat=repeat, **off)
            made = lower(graph, rank, constants, regions, as_is, grad=grad)
        if made is None or not can_be_compiled(made):
            compiled = None
            made = lower(graph, rank, constants, regions, flat, grad=grad, written=written)
        super().__init__({**made.constants, **regions, **{n: Region(g) for n, g in made.repeated.items()}}, made.graph)
        self.weights, self.found, self.repeated, self.grad = made.weights, made.found, made.repeated, grad
        self.run: Callable[..., Any] = self.forward
        if compiled is not None:

            def without() -> Callable[..., Any]:
                return LoweredGraph(graph, rank, constants, regions, written, flat, grad, compiled).run

            self.run = as_compiled(self, grad, compiled, without if made.repeated else None)

    def __str__(self) -> str:
        kind = "with a backward" if self.grad else "forward only"
        title = f"lowered, {kind}: {', '.join(f'{n} {c}' for n, c in self.found.items() if c)}"
        return lowered_text(self.graph, title, self.repeated)
