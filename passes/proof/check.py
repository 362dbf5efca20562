"""check: a proof that a rewritten graph computes what the captured one does, on every rank, or where it fails.

The proof walks the rewritten graph once. For every value it finds which expression of the dense model that
value stands for, which of its indices each rank holds, whether it is a pending sum, and what the gradient
that arrives at it is worth (:mod:`passes.proof.claims`), from the op's own rule and from nothing else: no plan,
no hint of the passes that wrote the graph. The results must be the dense model's, whole and reduced, and every
parameter's gradient complete at the indices that each rank holds.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes import ops
from passes.graphs import module_path, source_line
from passes.layouts.layout import WHOLE, Layout
from passes.proof.claims import Claim, Unproved, agreed
from passes.proof.dense import read
from passes.proof.results import require_reduced
from passes.proof.rules import follow
from passes.proof.steps import Proof, Sizes, dims_by_layout

__all__ = ["Verdict", "check"]

_COLLECTIVES = (ops.all_reduce, ops.all_gather, ops.enter, ops.enter_overlapping)


@dataclass(frozen=True)
class Verdict:
    """What a proof came to.

    Attributes:
        proved: whether the graph is proved.
        values: how many values were proved.
        collectives: how many of them are collectives.
        blocks: how many blocks there are: the modules of lists, such as layers, and all that is outside of them.
        distinct: how many of them took unlike steps; identical layers take the same ones.
        node: the first node that could not be proved.
        module: its module path.
        source: its source line.
        expected: what was expected there.
        found: what was found.
        effect: what that does to the numbers.
    """

    proved: bool
    values: int
    collectives: int
    blocks: int
    distinct: int
    node: str = ""
    module: str = ""
    source: str = ""
    expected: str = ""
    found: str = ""
    effect: str = ""

    def __str__(self) -> str:
        if self.proved:
            blocks = f"{self.blocks} block{'s' * (self.blocks != 1)} ({self.distinct} distinct)"
            return f"PROVED: {self.values} values, {self.collectives} collectives, {blocks}"
        return (
            f"NOT PROVED: {self.node} in {self.module or 'the model'} ({self.source}): expected {self.expected}, "
            f"found {self.found}; {self.effect}"
        )


class _Walk:
    def __init__(
        self,
        captured: fx.Graph,
        graph: fx.Graph,
        weight_layouts: Mapping[str, Layout],
        parameters: Collection[str],
        tp: int,
        inputs: Mapping[int, Layout],
        results: Mapping[int, Layout],
    ) -> None:
        self.terms, self.dense = read(captured, parameters)
        self.captured, self.graph, self.weight_layouts, self.tp = captured, graph, weight_layouts, tp
        self.given, self.wanted = inputs, results
        self.proof = Proof(self.terms, tp)
        self.inputs = itertools.count()
        self.collectives = 0

    def value(self, node: fx.Node) -> Any:
        """What is known of a node's value."""
        if node.op == "placeholder":
            place = next(self.inputs)
            term = self.terms.find(("input", place))
            if term is None:
                raise Unproved("an input of the dense model", "another", "values would be read that it has not")
            return self.leaf(term, self.given.get(place, WHOLE))
        if node.op == "get_attr":
            name = str(node.target)
            term = self.terms.find(("attr", name))
            return ("region", name) if term is None else self.leaf(term, self.weight_layouts.get(name, WHOLE))
        self.collectives += node.target in _COLLECTIVES
        return follow(self.proof, node)

    def leaf(self, term: int, layout: Layout) -> Claim:
        """The claim of an input or a weight, as its ranks hold it."""
        grad = "complete" if self.terms.grads[term] else None
        return Claim(term, dims_by_layout(self.terms.shapes[term], layout)).with_grad(grad)

    def run(self) -> Verdict:
        values, node, blocks = 0, None, defaultdict[str, list[Any]](list)
        try:
            for node in self.graph.nodes:
                if node.op == "output":
                    self.results(node)
                    continue
                found = self.proof.values[node] = self.value(node)
                values += 1
                if node.op == "call_function":
                    of = [self.kind(self.proof.values[n]) for n in node.all_input_nodes]
                    blocks[self.block(node)].append((node.target, *of, self.kind(found)))
        except Exception as error:
            assert node is not None
            if not isinstance(error, Unproved):  # a call that no rule can read, be it the program's fault or the rule's
                said = f"{type(error).__name__}: {error}"
                error = Unproved("a step that the proof can read", said, "what it computes is not known")
            return Verdict(
                False, values, self.collectives, 0, 0, node.name, node.meta.get("module", module_path(node)),
                node.meta.get("source", source_line(node)), error.expected, error.found, error.effect,
            )  # fmt: skip
        return Verdict(True, values, self.collectives, len(blocks), len({tuple(b) for b in blocks.values()}))

    @staticmethod
    def block(node: fx.Node) -> str:
        """The path of the outermost module in a list that a step is of; empty outside of all."""
        path = str(node.meta.get("module", module_path(node))).split(".")
        at = next((i for i, name in enumerate(path) if name.isdigit()), -1)
        return ".".join(path[: at + 1])

    @staticmethod
    def kind(value: Any) -> Any:
        """What a step is about, whichever values it is of: identical layers take the same steps."""
        return (value.dims, value.grad, value.pending) if isinstance(value, Claim) else type(value)

    def is_wanted(self, claim: Claim, place: int) -> bool:
        """Whether ranks hold of a result what they are to return: the whole, or what they keep in its slot."""
        wanted = dims_by_layout(self.terms.shapes[claim.term], self.wanted.get(place, WHOLE))
        same = (agreed(one, other) for one, other in zip(wanted, claim.dims, strict=True))
        return not claim.pending and claim.uncounted is None and None not in same

    def results(self, node: fx.Node) -> None:
        """That the results are the dense model's."""
        (output,) = (n for n in self.captured.nodes if n.op == "output")
        mine, theirs = fx.node.map_arg(node.args[0], lambda n: n), output.args[0]
        if len(mine) != len(theirs):
            raise Unproved(f"{len(theirs)} results", f"{len(mine)}", "results would be missing")
        for place, (got, want) in enumerate(zip(mine, theirs, strict=True)):
            if not isinstance(want, fx.Node):
                if got != want:
                    raise Unproved(f"result {place} to be {want}", f"{got}", "the results would differ")
                continue
            term, claim = self.dense[want], self.proof.values.get(got)
            if isinstance(claim, list):
                claim = next((c for c in claim if c.term == term and self.is_wanted(c, place)), claim[0])
            if not isinstance(claim, Claim):
                if isinstance(claim, Sizes) and all(size == term for size in claim.ranks):
                    continue
                raise Unproved(f"result {place} to be a tensor", repr(got), "the results would differ")
            require_reduced(claim, f"result {place}")
            if claim.term != term:
                raise Unproved(
                    f"result {place} to be {want.name} of the dense model", "another value", "the results would differ"
                )
            if not self.is_wanted(claim, place):
                layout = self.wanted.get(place, WHOLE)
                raise Unproved(f"result {place} to be {layout}", str(claim), "each rank would return another part")
            if self.terms.grads[term] and claim.grad not in ("complete", "both"):
                raise Unproved(
                    f"result {place} to take a complete gradient",
                    f"one that is {claim}",
                    "gradients would be summed over ranks or lost",
                )


def check(
    captured: fx.Graph,
    graph: fx.Graph,
    weight_layouts: Mapping[str, Layout],
    parameters: Collection[str],
    tp: int,
    inputs: Mapping[int, Layout] | None = None,
    results: Mapping[int, Layout] | None = None,
) -> Verdict:
    """Prove that a rewritten graph is the captured one.

    Args:
        captured: the dense model's graph.
        graph: the graph of all ranks, in which a constant that differs between them is a ``PerRank``.
        weight_layouts: the layouts in which ranks hold parameters and buffers; others are whole.
        inputs: the layouts in which ranks are given inputs, by position; others are whole.
        results: the layouts in which ranks are to return results, by position; others are whole.
        parameters: the ``get_attr`` targets that gradients are wanted of.
        tp: the number of ranks.

    Returns:
        PROVED with counts, or the first node that cannot be proved.
    """
    return _Walk(captured, graph, weight_layouts, parameters, tp, inputs or {}, results or {}).run()
