"""check: a proof that a rewritten graph computes what the captured one does, on every rank, or where it fails.

The proof walks the rewritten graph once. For every value it finds which expression of the dense model that
value stands for, which of its indices each rank holds, whether it is a pending sum, and what the gradient
that arrives at it is worth (:mod:`passes.proof.claims`), from the op's own rule and from nothing else: no plan,
no hint of the passes that wrote the graph. The results must be the dense model's, whole and reduced, and every
parameter's gradient complete at the indices that each rank holds.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes import ops
from passes.axes import Size
from passes.graphs import module_path, op_name, source_line
from passes.layout import WHOLE, Layout
from passes.norms import norm_over_shards
from passes.proof import collectives, dense, moves, others, products
from passes.proof.claims import Claim, Unproved
from passes.proof.dense import read
from passes.proof.steps import Proof, Rule, Sizes, Step, dims_by_layout
from passes.proof.terms import spelled
from passes.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding

__all__ = ["Verdict", "check"]

aten = torch.ops.aten
_PARALLEL: dict[Any, Rule] = {
    ops.all_reduce: collectives.all_reduce,
    ops.all_gather: collectives.all_gather,
    ops.settle: collectives.settle,
    ops.enter: collectives.enter,
    ops.enter_overlapping: collectives.enter_overlapping,
    ops.narrow: moves.narrow,
    ops.take: moves.take,
    norm_over_shards: collectives.norm_over_shards,
    vocab_parallel_embedding: collectives.vocab_embedding,
    vocab_parallel_cross_entropy: collectives.vocab_loss,
    operator.getitem: others.getitem,
}
_STANDS_FOR: dict[Any, Any] = {
    ops.column_parallel_linear: aten.linear.default,
    ops.row_parallel_linear: aten.linear.default,
    ops.column_parallel_matmul: aten.matmul.default,
    ops.row_parallel_matmul: aten.matmul.default,
    ops.column_parallel_addmm: aten.addmm.default,
    ops.column_parallel_baddbmm: aten.baddbmm.default,
    ops.column_parallel_einsum: aten.einsum.default,
    ops.row_parallel_einsum: aten.einsum.default,
    ops.head_parallel_attention: aten.scaled_dot_product_attention.default,
}
"""The op that each parallel product is another name of."""
_RULES: Mapping[str, Rule] = (
    dict.fromkeys(dense.VIEWS, moves.view)
    | dict.fromkeys(dense.PERMUTES, moves.permute)
    | dict.fromkeys(dense.EXPANDS, moves.expand)
    | dict.fromkeys(dense.PARTS, moves.part)
    | dict.fromkeys(dense.PRODUCTS, products.einsum)
    | dict.fromkeys(dense.CONVOLUTIONS, products.convolution)
    | dict.fromkeys(dense.NORMS, others.norm)
    | dict.fromkeys(("aten.add", "aten.sub", "aten.neg", "aten.mul", "aten.div"), others.arithmetic)
    | dict.fromkeys(("aten.sum", "aten.mean"), others.summed)
    | dict.fromkeys(("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.cumsum",
                     "aten.cumprod", "aten.logcumsumexp", "aten.tril", "aten.triu"), others.scan)
    | dict.fromkeys(("aten.amax", "aten.amin", "aten.prod", "aten.var", "aten.std", "aten.argmax", "aten.argmin",
                     "aten.any", "aten.all", "aten.logsumexp", "aten.norm", "aten.linalg_vector_norm", "aten.median",
                     "aten.count_nonzero", "max_values", "max_indices", "min_values", "min_indices"), others.reduced)
    | dict.fromkeys(("aten.pad", "aten.constant_pad_nd", "aten.roll"), others.shifted)
    | dict.fromkeys(("aten.view_as_complex", "aten.view_as_real"), others.complex_pairs)
    | dict.fromkeys(("aten.index", "aten.index_select"), others.index)
    | {
        "aten.cat": moves.join,
        "aten.embedding": others.embedding,
        "aten.scaled_dot_product_attention": products.attention,
        "flex_attention_outputs": products.flex_attention,
        "aten.linalg_solve_triangular": products.solve,
        "aten._grouped_mm": products.grouped,
        "transformers.grouped_mm_fallback": products.grouped,
    }
)  # fmt: skip
_POINTWISE = {"aten.to", "aten._to_copy", "aten.__and__", "aten.__or__", "aten.__xor__", "aten.type_as", "aten.clone",
              "aten.contiguous", "aten.detach", "aten.alias", "aten.masked_fill", "aten.zeros_like", "aten.ones_like",
              "aten.full_like", "aten.float_power", "aten.square", "aten.rsub", "aten.lift_fresh_copy", "aten.relu6",
              "aten.selu", "aten.gelu", "aten.log_sigmoid", "aten.softplus", "aten.hardswish", "aten.mish",
              "aten.logical_and", "aten.logical_not", "aten.where", "aten.nan_to_num", "aten.clamp",
              "aten.clip"}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What a proof came to.

    Attributes:
        proved: whether the graph is proved.
        values: how many values were proved.
        collectives: how many of them are collectives.
        distinct: how many of the steps were unlike all before: those of identical layers are not.
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
    distinct: int
    node: str = ""
    module: str = ""
    source: str = ""
    expected: str = ""
    found: str = ""
    effect: str = ""

    def __str__(self) -> str:
        if self.proved:
            return f"PROVED: {self.values} values, {self.collectives} collectives, {self.distinct} distinct steps"
        return (
            f"NOT PROVED: {self.node} in {self.module or 'the model'} ({self.source}): expected {self.expected}, "
            f"found {self.found}; {self.effect}"
        )


class _Walk:
    def __init__(
        self, captured: fx.Graph, graph: fx.Graph, stored: Mapping[str, Layout], parameters: Collection[str], tp: int
    ) -> None:
        self.terms, self.dense = read(captured, parameters)
        self.captured, self.graph, self.stored, self.tp = captured, graph, stored, tp
        self.proof = Proof(self.terms, tp)
        self.inputs = itertools.count()
        self.collectives = 0

    def values(self, node: fx.Node) -> Any:
        """What is known of a node's value: a claim, or several that are all true.

        A view may be a part of more than one view of the whole; which one matters shows only where it is used.
        """
        several = {n: c for n in node.all_input_nodes if isinstance(c := self.proof.values[n], list)}
        found, failure = list[Any](), None
        for choice in itertools.islice(itertools.product(*several.values()), 64):
            self.proof.chosen, self.proof.draws = dict(zip(several, choice, strict=True)), []
            try:
                value = self.value(node)
                found += value if isinstance(value, list) else [value]
            except Unproved as error:
                failure = failure or error
        if not found:
            assert failure is not None
            raise failure
        for key, drawn in self.proof.draws:
            self.terms.draws[key].remove(drawn)
        self.proof.chosen = {}
        found = list(dict.fromkeys(found))
        return found[0] if len(found) == 1 else found[:8]

    def value(self, node: fx.Node) -> Any:
        """What is known of a node's value, given what is at hand of its inputs."""
        if node.op == "placeholder":
            term = self.terms.find(("input", next(self.inputs)))
            if term is None:
                raise Unproved("an input of the dense model", "another", "values would be read that it has not")
            return self.leaf(term, WHOLE)
        if node.op == "get_attr":
            name = str(node.target)
            term = self.terms.find(("attr", name))
            return ("region", name) if term is None else self.leaf(term, self.stored.get(name, WHOLE))
        if node.target in _PARALLEL:
            args = dict(enumerate(node.args)) | node.kwargs
            step = Step(node, op_name(node), node.target, {str(k): v for k, v in args.items()})
            self.collectives += node.target in (ops.all_reduce, ops.all_gather, ops.enter, ops.enter_overlapping)
            return _PARALLEL[node.target](self.proof, step)
        target, args, kwargs = node.target, node.args, dict(node.kwargs)
        draws = target in (ops.random_same, ops.random_per_rank)
        if draws:
            target, args = args[0], args[1:]
        target = _STANDS_FOR.get(target, target)
        name = str(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else op_name(node)
        step = Step(node, name, target, spelled(target, args, kwargs))
        if draws:
            return others.random(self.proof, step)
        sizes = self.size(name, step)
        if sizes is not None:
            return sizes
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            return _RULES.get(name, others.pointwise)(self.proof, step)
        rule = _RULES.get(name) or (others.pointwise if name in _POINTWISE else others.general)
        return rule(self.proof, step)

    def leaf(self, term: int, layout: Layout) -> Claim:
        """The claim of an input or a weight, as it is stored."""
        grad = "complete" if self.terms.grads[term] else None
        return Claim(term, dims_by_layout(self.terms.shapes[term], layout)).with_grad(grad)

    def size(self, name: str, step: Step) -> Any:
        """A size computed in the graph; None for other ops."""
        proof, args = self.proof, step.node.args
        if name == "aten.sym_size":
            claim = proof.claim(args[0])
            return Sizes(tuple(claim.local(r)[args[1]] for r in range(self.tp)))
        tensors = [n for n in step.node.all_input_nodes if proof.is_tensor(n)]
        if tensors and not name.startswith("aten.sym_"):
            if name != "aten.item":
                return None
            known = self.terms.placed["size", 0].get((name, tuple(proof.key(a) for a in args)))
            if known is None:
                return None
            for operand in tensors:  # a number read out of a tensor
                proof.whole(proof.claim(operand))
            return Sizes((known,) * self.tp)  # type: ignore[arg-type]
        if isinstance(step.target, torch._ops.OpOverload) and not tensors and not name.startswith("aten.sym_"):
            return None
        operands = [proof.ranks(a) for a in args]
        if all(each == [each[0]] * self.tp for each in operands):
            known = self.terms.placed["size", 0].get((name, tuple(proof.key(a) for a in args)))
            if known is not None:
                return Sizes((known,) * self.tp)  # type: ignore[arg-type]
        if step.target in (operator.mul, operator.floordiv) and len(args) == 2:
            found = []
            for left, right in zip(*operands, strict=True):
                one, two = (
                    x if isinstance(x, Size) else Size(x) if isinstance(x, int) and x > 0 else None
                    for x in (left, right)
                )
                found.append(
                    None if one is None or two is None else one * two if step.target is operator.mul else one.over(two)
                )
            if all(f is not None for f in found):
                return Sizes(tuple(f for f in found if f is not None))
        if isinstance(step.target, torch._ops.OpOverload) or step.target is operator.getitem:
            return None
        return ("number", name, tuple(proof.key(a) for a in args))

    def run(self) -> Verdict:
        values, node, seen = 0, None, set()
        try:
            for node in self.graph.nodes:
                if node.op == "output":
                    self.results(node)
                    continue
                found = self.proof.values[node] = self.values(node)
                values += 1
                seen.add(
                    (node.target, *(self.kind(self.proof.values[n]) for n in node.all_input_nodes), self.kind(found))
                )
        except Exception as error:
            assert node is not None
            if not isinstance(error, Unproved):  # a call that no rule can read, be it the program's fault or the rule's
                said = f"{type(error).__name__}: {error}"
                error = Unproved("a step that the proof can read", said, "what it computes is not known")
            return Verdict(
                False, values, self.collectives, 0, node.name, node.meta.get("module", module_path(node)),
                node.meta.get("source", source_line(node)), error.expected, error.found, error.effect,
            )  # fmt: skip
        return Verdict(True, values, self.collectives, len(seen))

    @staticmethod
    def kind(value: Any) -> Any:
        """What a step is about, whichever values it is of: identical layers take the same steps."""
        return (value.dims, value.grad, value.pending) if isinstance(value, Claim) else type(value)

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
                claim = next((c for c in claim if c.term == term and c.whole), claim[0])
            if not isinstance(claim, Claim):
                if isinstance(claim, Sizes) and all(size == term for size in claim.ranks):
                    continue
                raise Unproved(f"result {place} to be a tensor", repr(got), "the results would differ")
            self.proof.settled(claim, f"result {place}")
            if claim.term != term:
                raise Unproved(
                    f"result {place} to be {want.name} of the dense model", "another value", "the results would differ"
                )
            if not claim.whole:
                raise Unproved(f"result {place} to be whole", str(claim), "each rank would return its own part")
            if self.terms.grads[term] and claim.grad != "complete":
                raise Unproved(
                    f"result {place} to take a complete gradient",
                    f"one that is {claim}",
                    "gradients would be summed over ranks or lost",
                )


def check(
    captured: fx.Graph, graph: fx.Graph, stored: Mapping[str, Layout], parameters: Collection[str], tp: int
) -> Verdict:
    """Prove that a rewritten graph is the captured one.

    Args:
        captured: the dense model's graph.
        graph: the graph of all ranks, in which a constant that differs between them is a ``PerRank``.
        stored: the layouts in which ranks hold parameters and buffers; others are whole, as inputs and results are.
        parameters: the ``get_attr`` targets that gradients are wanted of.
        tp: the number of ranks.

    Returns:
        PROVED with counts, or the first node that cannot be proved.
    """
    return _Walk(captured, graph, stored, parameters, tp).run()
