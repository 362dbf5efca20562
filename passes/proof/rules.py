"""Which rule each step of a rewritten graph follows, and what it says of the step."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from passes import ops
from passes.graphs import op_name
from passes.layouts.axes import Size
from passes.ops.norms import norm_over_shards
from passes.ops.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding
from passes.proof import collectives, dense, elementwise, lookups, movement, products, reductions
from passes.proof.claims import Unproved
from passes.proof.results import require_replicated
from passes.proof.steps import Proof, Rule, Sizes, Step
from passes.proof.terms import spelled

__all__ = ["follow"]

aten = torch.ops.aten
_PARALLEL: dict[Any, Rule] = {
    ops.all_reduce: collectives.all_reduce,
    ops.all_gather: collectives.all_gather,
    ops.broadcast_from_first: collectives.broadcast_from_first,
    ops.enter: collectives.enter,
    ops.enter_overlapping: collectives.enter_overlapping,
    ops.deduplicate_gradient: collectives.deduplicate_gradient,
    ops.narrow: movement.narrow,
    ops.take: movement.take,
    norm_over_shards: collectives.norm_over_shards,
    vocab_parallel_embedding: collectives.vocab_embedding,
    vocab_parallel_cross_entropy: collectives.vocab_loss,
    operator.getitem: elementwise.getitem,
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
    dict.fromkeys(dense.VIEWS, movement.view)
    | dict.fromkeys(dense.PERMUTES, movement.permute)
    | dict.fromkeys(dense.EXPANDS, movement.expand)
    | dict.fromkeys(dense.PARTS, movement.part)
    | dict.fromkeys(dense.PRODUCTS, products.einsum)
    | dict.fromkeys(dense.CONVOLUTIONS, products.convolution)
    | dict.fromkeys(dense.NORMS, reductions.norm)
    | dict.fromkeys(("aten.add", "aten.sub", "aten.neg", "aten.mul", "aten.div"), elementwise.arithmetic)
    | dict.fromkeys(("aten.sum", "aten.mean"), reductions.summed)
    | dict.fromkeys(("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.cumsum",
                     "aten.cumprod", "aten.logcumsumexp", "aten.tril", "aten.triu"), reductions.scan)
    | dict.fromkeys(("aten.amax", "aten.amin", "aten.prod", "aten.var", "aten.std", "aten.argmax", "aten.argmin",
                     "aten.any", "aten.all", "aten.logsumexp", "aten.norm", "aten.linalg_vector_norm", "aten.median",
                     "aten.count_nonzero", "max_values", "max_indices", "min_values", "min_indices"),
                     reductions.reduced)
    | dict.fromkeys(("aten.pad", "aten.constant_pad_nd", "aten.roll"), reductions.shifted)
    | dict.fromkeys(("aten.view_as_complex", "aten.view_as_real"), reductions.complex_pairs)
    | dict.fromkeys(("aten.index", "aten.index_select"), lookups.index)
    | dict.fromkeys(("aten.index_copy", "aten.index_put", "aten.slice_scatter"), lookups.placed)
    | {
        "aten.cat": movement.join,
        "aten.embedding": lookups.embedding,
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
              "aten.clip", "aten.leaky_relu"}  # fmt: skip


def follow(proof: Proof, node: fx.Node) -> Any:
    """What is known of a call's result: a claim, or several that are all true.

    A view may be a part of more than one view of the whole; which one matters shows only where it is used.

    Raises:
        Unproved: nothing is known of it, whichever of the true claims of its operands are taken.
    """
    several = {n: c for n in node.all_input_nodes if isinstance(c := proof.values[n], list)}
    found, failure = list[Any](), None
    for choice in itertools.islice(itertools.product(*several.values()), 64):
        proof.chosen, proof.draws = dict(zip(several, choice, strict=True)), []
        try:
            value = _by_rule(proof, node)
            found += value if isinstance(value, list) else [value]
        except Unproved as error:
            failure = failure or error
    if not found:
        assert failure is not None
        raise failure
    for key, drawn in proof.draws:
        proof.terms.draws[key].remove(drawn)
    proof.chosen = {}
    found = list(dict.fromkeys(found))
    return found[0] if len(found) == 1 else found[:8]


def _by_rule(proof: Proof, node: fx.Node) -> Any:
    """What is known of a call's result, given what is at hand of its inputs."""
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    if target in _PARALLEL:
        named = dict(enumerate(args)) | kwargs
        return _PARALLEL[target](proof, Step(node, op_name(node), target, {str(k): v for k, v in named.items()}))
    draws = target in (ops.random_same, ops.random_per_rank)
    if draws:
        target, args = args[0], args[1:]
    target = _STANDS_FOR.get(target, target)
    name = str(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else op_name(node)
    step = Step(node, name, target, spelled(target, args, kwargs))
    if draws:
        return elementwise.random(proof, step)
    sizes = _size(proof, step)
    if sizes is not None:
        return sizes
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _RULES.get(name, elementwise.pointwise)(proof, step)
    rule = _RULES.get(name) or (elementwise.pointwise if name in _POINTWISE else elementwise.general)
    return rule(proof, step)


def _size(proof: Proof, step: Step) -> Any:
    """A size or another number computed in the graph; None for other ops."""
    name, args = step.name, step.node.args
    if name == "aten.sym_size":
        claim = proof.claim(args[0])
        return Sizes(tuple(claim.local(r)[args[1]] for r in range(proof.tp)))
    of_tensors = [n for n in step.node.all_input_nodes if proof.is_tensor(n)]
    an_op, of_sizes = isinstance(step.target, torch._ops.OpOverload), name.startswith("aten.sym_")
    if (of_tensors and not of_sizes and name != "aten.item") or (an_op and not of_tensors and not of_sizes):
        return None
    each = [proof.ranks(a) for a in args]
    alike = all(ranks == [ranks[0]] * proof.tp for ranks in each)
    known = proof.terms.sizes.get((name, tuple(proof.key(a) for a in args))) if alike else None
    if known is not None:
        for operand in of_tensors:  # a number read out of a tensor
            require_replicated(proof.claim(operand))
        return Sizes((known,) * proof.tp)
    if step.target in (operator.mul, operator.floordiv) and len(args) == 2:
        found = [_combined(step.target, *pair) for pair in zip(*each, strict=True)]
        if all(f is not None for f in found):
            return Sizes(tuple(f for f in found if f is not None))
    if an_op or step.target is operator.getitem:
        return None
    return ("number", name, tuple(proof.key(a) for a in args))


def _combined(target: Any, left: Any, right: Any) -> Size | None:
    """The product or the quotient of two sizes."""
    one, two = (Size(x) if isinstance(x, int) and x > 0 else x for x in (left, right))
    if not isinstance(one, Size) or not isinstance(two, Size):
        return None
    return one * two if target is operator.mul else one.over(two)
