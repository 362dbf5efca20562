"""rewrite: from a captured graph to the program of each rank."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from autotp.capture import Captured
from autotp.giving import giver
from autotp.lowered import LoweredGraph, Weights
from autotp.text import graph_text
from passes import (
    Layout,
    Lowering,
    Minimum,
    Reason,
    Verdict,
    assign,
    check,
    decide,
    enter,
    localize,
    minimum,
    ops,
    propagate,
    shard,
)

__all__ = ["RankGraph", "Rewritten", "rewrite"]


@dataclass
class Rewritten:
    """A captured graph rewritten for all ranks.

    Attributes:
        captured: the captured graph.
        graph: the rewritten graph, in which constants that differ between ranks are ``PerRank``.
        stored: each split weight's layout, by name.
        reasons: why each other weight stays whole.
        gathered: the split values that some op needs whole, with that op's name.
        tp: the number of ranks.
        minimum: what cannot do without a collective, in the captured graph.
        slots: the layouts of all slots that are known now.
        inputs: the layouts of the input tensors that ranks hold in parts, by position.
        results: the same for results.
    """

    captured: Captured
    graph: fx.Graph
    stored: Mapping[str, Layout]
    reasons: Mapping[str, Reason]
    gathered: list[tuple[fx.Node, str]]
    tp: int
    minimum: Minimum
    slots: Mapping[str, Layout] = field(default_factory=dict)
    inputs: Mapping[int, Layout] = field(default_factory=dict)
    results: Mapping[int, Layout] = field(default_factory=dict)

    @functools.cached_property
    def random(self) -> bool:
        """Whether the program draws random numbers."""
        return any(n.target in (ops.random_same, ops.random_per_rank) for n in self.graph.nodes)

    @functools.cached_property
    def verdict(self) -> Verdict:
        """Whether the program is proved to be the captured graph's on every rank, forward and backward."""
        return check(
            self.captured.graph,
            self.graph,
            self.stored,
            self.captured.parameters,
            self.tp,
            self.inputs,
            self.results,
        )

    def unflatten(self, results: tuple[Any, ...], objects: Sequence[Any] = ()) -> Any:
        """The model's own output structure from the graph's results; what a call changes in objects, it changes."""
        return self._give(results, objects)

    @functools.cached_property
    def _give(self) -> Any:
        return giver(self.captured.outputs)


class RankGraph(fx.GraphModule):
    """The program of one rank: an fx graph over the model's own parameters, buffers and modules.

    It has the very dicts that the model keeps them in, so that it sees what is assigned to the model later.
    ``print`` it to read it: each line is commented with the value's type and layout.

    Attributes:
        note: what to say of it above its text: which of a module's graphs it is.
    """

    note: str = ""

    def __init__(self, rewritten: Rewritten, rank: int, model: nn.Module) -> None:
        super().__init__(nn.Module(), fx.Graph())
        self.__dict__ |= {k: model.__dict__[k] for k in ("_modules", "_parameters", "_buffers")}
        self.__dict__ |= rewritten.captured.constants | rewritten.captured.regions
        self.rank, self.tp = rank, rewritten.tp
        self.graph = localize(rewritten.graph, rank)
        captured = rewritten.captured
        self._held = captured.constants, captured.regions, captured.outputs.written
        self.__dict__["_model"] = model  # not a child: its dicts are this one's
        self._lowered: dict[tuple[Lowering, bool], LoweredGraph] = {}
        self._bound: dict[tuple[bool, bool], tuple[LoweredGraph, Weights]] = {}

    def lowered(self, lowering: Lowering, grad: bool) -> LoweredGraph:
        """The program as it runs.

        Args:
            lowering: which passes make it faster.
            grad: whether a backward follows.
        """
        key = lowering, grad
        if key not in self._lowered:
            self._lowered[key] = LoweredGraph(self.graph, self.rank, *self._held, lowering, grad)
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
            lowering: which passes make it faster; the same in every call.
            tensors: the inputs, as this rank holds them.
            seen: the same object as in the last call if no weight has been replaced or moved since; None: unknown.
            compiled: options for ``torch.compile``, if the program is to be compiled.
        """
        key = torch.is_grad_enabled(), compiled is not None
        if key not in self._bound:
            self._bind(lowering, key, compiled)
        graph, weights = self._bound[key]
        taken = weights.take(seen)
        if taken is None:  # weights that were to be one are not of one kind
            self._bind(replace(lowering, merge=False), key, compiled)
            return self.execute(lowering, tensors, seen, compiled)
        results: tuple[Any, ...] = graph.run(*tensors, *taken)
        return results

    def _bind(self, lowering: Lowering, key: tuple[bool, bool], compiled: Mapping[str, Any] | None) -> None:
        if compiled is None:
            graph = self.lowered(lowering, key[0])
        else:
            graph = LoweredGraph(self.graph, self.rank, *self._held, lowering, key[0], compiled)
        self._bound[key] = graph, Weights(self._model, graph.weights, compiled is not None)

    def __str__(self) -> str:
        return graph_text(self.graph, f"rank {self.rank} of {self.tp}{self.note}", self.rank)


def rewrite(
    captured: Captured,
    tp: int,
    stored: Mapping[str, Layout] | None = None,
    settled: Mapping[str, Layout] | None = None,
    slots: Mapping[str, Layout] | None = None,
) -> Rewritten:
    """Rewrite a captured graph for ``tp`` ranks.

    Args:
        captured: the captured model.
        tp: the number of ranks.
        stored: the weights' layouts, where they are settled (by a plan, or an earlier call); left out,
            they are decided here.
        settled: layouts of some of the weights, where others are to be decided: what another part of the
            model has made of a weight that both use.
        slots: the layouts of what ranks keep in parts between calls, as far as they are decided.
    """
    facts = propagate(captured.graph)
    reasons: Mapping[str, Reason] = {}
    if stored is None:
        decision = decide(captured.graph, facts, tp)
        settled = settled or {}
        stored = {n: x for n, x in (decision.stored | dict(settled)).items() if not x.whole}
        outside = {n: Reason("read by Python that is not captured") for n, x in settled.items() if x.whole}
        reasons = _confirmed(captured, decision.reasons) | outside
    layouts = assign(captured.graph, facts, stored, tp, slots)
    fewest = minimum(captured.graph, facts, layouts, stored)
    sharder = shard(captured.graph, facts, layouts, dict(stored), tp, slots)
    sharder.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    enter(sharder.graph)
    return Rewritten(
        captured, sharder.graph, stored, reasons, sharder.gathered, tp, fewest, sharder.slots, sharder.inputs,
        sharder.results,
    )  # fmt: skip


def _confirmed(captured: Captured, reasons: Mapping[str, Reason]) -> dict[str, Reason]:
    """Reasons, with the limits only of those weights that are split where there are no more ranks than that."""
    limits = {reason.limit for reason in reasons.values()} - {None, 1}
    stored = {n: decide(captured.graph, propagate(captured.graph), n).stored for n in limits if n is not None}
    return {
        name: reason if name in stored.get(reason.limit or 0, {name}) else replace(reason, limit=None)
        for name, reason in reasons.items()
    }
