"""check: a proof that a rewritten graph computes on every rank what the captured one does, or the step where it fails.

The proof walks the rewritten graph once. For every value it derives a claim (:mod:`passes.proof.claims`): the
expression of the dense model that the value stands for, the indices that each rank holds, whether it is a partial sum,
and the kind of its gradient. The claim follows from the op's own rule and from nothing else: no plan, and no hint of
the passes that wrote the graph. The results must be the dense model's, in the layouts that are asked for and reduced,
and every parameter's gradient complete at the indices that each rank holds.
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
from passes.proof.claims import Claim, Unproved, common_dim
from passes.proof.dense import read
from passes.proof.results import require_reduced
from passes.proof.rules import follow
from passes.proof.steps import Proof, Sizes, dims_by_layout

__all__ = ["Verdict", "check"]

_COLLECTIVES = (ops.all_reduce, ops.all_gather, ops.enter, ops.enter_overlapping)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a proof.

    Attributes:
        proved: whether the graph is proved.
        values: the number of values that were proved.
        collectives: the number of collectives among them.
        blocks: the number of blocks: each module of a list, such as a layer, is one, and all code outside of lists.
        distinct: the number of blocks with different steps; identical layers have the same steps.
        node: the first node that could not be proved.
        module: its module path.
        source: its source line.
        expected: what was expected there.
        found: what was found.
        effect: the effect on the numbers.
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
        self.input_layouts, self.result_layouts = inputs, results
        self.proof = Proof(self.terms, tp)
        self.inputs = itertools.count()
        self.collectives = 0

    def value(self, node: fx.Node) -> Any:
        """The claim of a node's value."""
        if node.op == "placeholder":
            position = next(self.inputs)
            term = self.terms.find(("input", position))
            if term is None:
                raise Unproved(
                    "an input of the dense model", "another", "a value that the dense model lacks would be read"
                )
            return self.leaf(term, self.input_layouts.get(position, WHOLE))
        if node.op == "get_attr":
            name = str(node.target)
            term = self.terms.find(("attr", name))
            return ("region", name) if term is None else self.leaf(term, self.weight_layouts.get(name, WHOLE))
        self.collectives += node.target in _COLLECTIVES
        return follow(self.proof, node)

    def leaf(self, term: int, layout: Layout) -> Claim:
        """The claim of an input or a weight that ranks hold in a layout."""
        grad = "complete" if self.terms.grads[term] else None
        return Claim(term, dims_by_layout(self.terms.shapes[term], layout)).with_grad(grad)

    def run(self) -> Verdict:
        values, node, blocks = 0, None, defaultdict[str, list[Any]](list)
        try:
            for node in self.graph.nodes:
                if node.op == "output":
                    self.results(node)
                    continue
                value = self.proof.values[node] = self.value(node)
                values += 1
                if node.op == "call_function":
                    operands = [self.kind(self.proof.values[n]) for n in node.all_input_nodes]
                    blocks[self.block(node)].append((node.target, *operands, self.kind(value)))
        except Exception as error:
            assert node is not None
            if not isinstance(error, Unproved):  # no rule can read the call: the program is wrong, or the rule is
                message = f"{type(error).__name__}: {error}"
                error = Unproved("a step that the proof can read", message, "its result is not known")
            return Verdict(
                False, values, self.collectives, 0, 0, node.name, node.meta.get("module", module_path(node)),
                node.meta.get("source", source_line(node)), error.expected, error.found, error.effect,
            )  # fmt: skip
        return Verdict(True, values, self.collectives, len(blocks), len({tuple(b) for b in blocks.values()}))

    @staticmethod
    def block(node: fx.Node) -> str:
        """The path of the outermost list element that a step belongs to; empty for one outside of lists."""
        path = str(node.meta.get("module", module_path(node))).split(".")
        at = next((i for i, name in enumerate(path) if name.isdigit()), -1)
        return ".".join(path[: at + 1])

    @staticmethod
    def kind(value: Any) -> Any:
        """The form of a value without its identity, which is the same in identical layers."""
        return (value.dims, value.grad, value.pending) if isinstance(value, Claim) else type(value)

    def has_result_layout(self, claim: Claim, position: int) -> bool:
        """Whether ranks hold a result in the layout that they are to return it in."""
        dims = dims_by_layout(self.terms.shapes[claim.term], self.result_layouts.get(position, WHOLE))
        common = (common_dim(wanted, dim) for wanted, dim in zip(dims, claim.dims, strict=True))
        return not claim.pending and claim.unweighted is None and None not in common

    def results(self, node: fx.Node) -> None:
        """Raise if the results are not the dense model's."""
        (output,) = (n for n in self.captured.nodes if n.op == "output")
        results, expected = fx.node.map_arg(node.args[0], lambda n: n), output.args[0]
        if len(results) != len(expected):
            raise Unproved(f"{len(expected)} results", f"{len(results)}", "results would be missing")
        for position, (result, want) in enumerate(zip(results, expected, strict=True)):
            if isinstance(want, fx.Node):
                self.result(position, result, want)
            elif result != want:
                raise Unproved(f"result {position} to be {want}", f"{result}", "the results would differ")

    def result(self, position: int, result: Any, want: fx.Node) -> None:
        """Raise if one result is not a node's value in the dense model."""
        term, claim = self.dense[want], self.proof.values.get(result)
        if isinstance(claim, list):
            claim = next((c for c in claim if c.term == term and self.has_result_layout(c, position)), claim[0])
        if not isinstance(claim, Claim):
            if isinstance(claim, Sizes) and all(size == term for size in claim.ranks):
                return
            raise Unproved(f"result {position} to be a tensor", repr(result), "the results would differ")
        require_reduced(claim, f"result {position}")
        if claim.term != term:
            raise Unproved(
                f"result {position} to be {want.name} of the dense model", "another value", "the results would differ"
            )
        if not self.has_result_layout(claim, position):
            layout = self.result_layouts.get(position, WHOLE)
            raise Unproved(f"result {position} to be {layout}", str(claim), "each rank would return another shard")
        if self.terms.grads[term] and claim.grad not in ("complete", "both"):
            raise Unproved(
                f"result {position} to take a complete gradient",
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
    """Prove that a rewritten graph computes what the captured one does.

    Args:
        captured: the dense model's graph.
        graph: the graph of all ranks, in which a constant that differs between them is a ``PerRank``.
        weight_layouts: the layouts of parameters and buffers, by ``get_attr`` target; others are unsplit.
        parameters: the ``get_attr`` targets of the parameters that need gradients.
        tp: the number of ranks.
        inputs: the layouts of inputs, by position; others are replicated.
        results: the layouts that ranks return results in, by position; others are replicated.

    Returns:
        PROVED with counts, or the first node that cannot be proved.
    """
    return _Walk(captured, graph, weight_layouts, parameters, tp, inputs or {}, results or {}).run()
