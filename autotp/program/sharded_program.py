"""sharded_program: a captured graph rewritten for all ranks, and proved."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
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
    """Raise or warn if a program is not proved.

    Args:
        program: the rewritten graph.
        name: the name of the model, for the message.
        proof: ``"warn"``: warn; else raise.

    Raises:
        ProofError: the program is not proved.
    """
    verdict = program.verdict
    if verdict.proved:
        return
    message = (
        f"the graph of {name} for {program.tp} ranks is not proved to be the dense model's: {verdict}. That is a "
        "mistake of autotp's: please report it"
    )
    if proof != "warn":
        raise ProofError(f'{message}. check="warn" or check=False runs it all the same; autotp.verify compares numbers')
    warnings.warn(message, UnprovedWarning, stacklevel=2)


@dataclass
class ShardedProgram:
    """A captured graph rewritten for all ranks.

    Attributes:
        captured: the captured graph.
        graph: the rewritten graph, in which constants that differ between ranks are ``PerRank``.
        weight_layouts: each split weight's layout, by name.
        reasons: why each other weight stays unsplit.
        gathered: the split values that some op needs whole, with that op's name.
        tp: the number of ranks.
        minimum: the collectives that no program for the captured graph can do without.
        slots: the layouts of all slots that are known now.
        inputs: the layouts of the inputs that ranks hold as shards, by position.
        results: the layouts of the results that ranks hold as shards, by position.
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
        """The result of the proof that every rank computes the captured graph, forward and backward."""
        return check(
            self.captured.graph,
            self.graph,
            self.weight_layouts,
            self.captured.parameters,
            self.tp,
            self.inputs,
            self.results,
        )

    @functools.cached_property
    def rebuild_outputs(self) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
        """The function that applies a call's mutations to its objects and gives the model's own output structure.

        It takes the graph's results, and the objects among the call's arguments.
        """
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
        weight_layouts: the weights' layouts, if a plan or an earlier call has decided them; left out, they are decided
            here.
        settled: the layouts of some weights, where the other layouts are decided here: those of weights that another
            captured module uses, too.
        slots: the layouts of the state that ranks keep as shards between calls, as far as they are decided.
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
    least_collectives = minimum(captured.graph, facts, layouts, weight_layouts)
    sharded = shard(captured.graph, facts, layouts, dict(weight_layouts), tp, slots)
    sharded.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    enter(sharded.graph)
    return ShardedProgram(
        captured, sharded.graph, weight_layouts, reasons, sharded.gathered, tp, least_collectives, sharded.slots,
        sharded.inputs, sharded.results,
    )  # fmt: skip


def _split_weights(captured: CapturedGraph, tp: int) -> Mapping[str, Layout]:
    """The layouts of the weights that a plan for ``tp`` ranks splits."""
    return decide(captured.graph, propagate(captured.graph), tp).weight_layouts
