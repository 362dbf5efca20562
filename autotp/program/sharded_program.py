"""sharded_program: a captured graph rewritten for all ranks, and proved."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from autotp.capture.captured_graph import CapturedGraph
from autotp.capture.output_codegen import output_function
from autotp.errors import ProofError, UnprovedWarning
from passes import Layout, Minimum, Reason, Verdict, assign, check, decide, enter, minimum, ops, propagate, shard
from passes.planning.reasons import confirm_limits

__all__ = ["ShardedProgram", "prove", "shard_graph"]


def prove(program: ShardedProgram, name: str, proof: bool | str) -> None:
    """Look whether a program is proved.

    Args:
        program: the rewritten graph.
        name: whose it is.
        proof: ``"warn"``: one that is not is a warning; else an error.

    Raises:
        ProofError: it is not proved.
    """
    verdict = program.verdict
    if verdict.proved:
        return
    said = (
        f"the graph of {name} for {program.tp} ranks is not proved to be the dense model's: {verdict}. That is a "
        "mistake of autotp's: please report it"
    )
    if proof != "warn":
        raise ProofError(f'{said}. check="warn" or check=False runs it all the same; autotp.verify compares numbers')
    warnings.warn(said, UnprovedWarning, stacklevel=2)


@dataclass
class ShardedProgram:
    """A captured graph rewritten for all ranks.

    Attributes:
        captured: the captured graph.
        graph: the rewritten graph, in which constants that differ between ranks are ``PerRank``.
        weight_layouts: each split weight's layout, by name.
        reasons: why each other weight stays whole.
        gathered: the split values that some op needs whole, with that op's name.
        tp: the number of ranks.
        minimum: what cannot do without a collective, in the captured graph.
        slots: the layouts of all slots that are known now.
        inputs: the layouts of the input tensors that ranks hold in parts, by position.
        results: the same for results.
    """

    captured: CapturedGraph
    graph: fx.Graph
    weight_layouts: Mapping[str, Layout]
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
            self.weight_layouts,
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
        return output_function(self.captured.outputs)


def shard_graph(
    captured: CapturedGraph,
    tp: int,
    weight_layouts: Mapping[str, Layout] | None = None,
    settled: Mapping[str, Layout] | None = None,
    slots: Mapping[str, Layout] | None = None,
) -> ShardedProgram:
    """Rewrite a captured graph for ``tp`` ranks.

    Args:
        captured: the captured model.
        tp: the number of ranks.
        weight_layouts: the weights' layouts, where they are settled (by a plan, or an earlier call); left out,
            they are decided here.
        settled: layouts of some of the weights, where others are to be decided: what another part of the
            model has made of a weight that both use.
        slots: the layouts of what ranks keep in parts between calls, as far as they are decided.
    """
    facts = propagate(captured.graph)
    reasons: Mapping[str, Reason] = {}
    if weight_layouts is None:
        decision = decide(captured.graph, facts, tp)
        settled = settled or {}
        weight_layouts = {n: x for n, x in (decision.weight_layouts | dict(settled)).items() if not x.whole}
        outside = {n: Reason("read by Python that is not captured") for n, x in settled.items() if x.whole}
        reasons = confirm_limits(decision.reasons, lambda ranks: _split_weights(captured, ranks)) | outside
    layouts = assign(captured.graph, facts, weight_layouts, tp, slots)
    fewest = minimum(captured.graph, facts, layouts, weight_layouts)
    sharded = shard(captured.graph, facts, layouts, dict(weight_layouts), tp, slots)
    sharded.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    enter(sharded.graph)
    return ShardedProgram(
        captured, sharded.graph, weight_layouts, reasons, sharded.gathered, tp, fewest, sharded.slots, sharded.inputs,
        sharded.results,
    )  # fmt: skip


def _split_weights(captured: CapturedGraph, tp: int) -> Mapping[str, Layout]:
    """The layouts of the weights that a plan for ``tp`` ranks splits."""
    return decide(captured.graph, propagate(captured.graph), tp).weight_layouts
