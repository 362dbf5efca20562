"""rules: the rule of each step of a rewritten graph, and the claims that follow from it."""

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
from passes.proof.terms import named_arguments

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
_DENSE_OPS: dict[Any, Any] = {
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
"""For each parallel product the op that it computes on shards."""
_RULES: Mapping[str, Rule] = (
    dict.fromkeys(dense.VIEWS, movement.view)
    | dict.fromkeys(dense.PERMUTES, movement.permute)
    | dict.fromkeys(dense.EXPANDS, movement.expand)
    | dict.fromkeys(dense.SLICES, movement.slice_or_select)
    | dict.fromkeys(dense.PRODUCTS, products.einsum)
    | dict.fromkeys(dense.CONVOLUTIONS, products.convolution)
    | dict.fromkeys(dense.NORMS, reductions.norm)
    | dict.fromkeys(("aten.add", "aten.sub", "aten.neg", "aten.mul", "aten.div"), elementwise.arithmetic)
    | dict.fromkeys(("aten.sum", "aten.mean"), reductions.sum_or_mean)
    | dict.fromkeys(("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.cumsum",
                     "aten.cumprod", "aten.logcumsumexp", "aten.tril", "aten.triu"), reductions.scan)
    | dict.fromkeys(("aten.amax", "aten.amin", "aten.prod", "aten.var", "aten.std", "aten.argmax", "aten.argmin",
                     "aten.any", "aten.all", "aten.logsumexp", "aten.norm", "aten.linalg_vector_norm", "aten.median",
                     "aten.count_nonzero", "max_values", "max_indices", "min_values", "min_indices"),
                     reductions.reduction)
    | dict.fromkeys(("aten.pad", "aten.constant_pad_nd", "aten.roll"), reductions.pad_or_roll)
    | dict.fromkeys(("aten.view_as_complex", "aten.view_as_real"), reductions.complex_pairs)
    | dict.fromkeys(("aten.index", "aten.index_select"), lookups.index)
    | dict.fromkeys(("aten.index_copy", "aten.index_put", "aten.slice_scatter"), lookups.write)
    | {
        "aten.cat": movement.cat,
        "aten.unfold": movement.unfold,
        "aten.embedding": lookups.embedding,
        "aten.scaled_dot_product_attention": products.attention,
        "flex_attention_outputs": products.flex_attention,
        "aten.linalg_solve_triangular": products.solve,
        "aten._grouped_mm": products.grouped_matmul,
        "transformers.grouped_mm_fallback": products.grouped_matmul,
    }
)  # fmt: skip
_POINTWISE = {"aten.to", "aten._to_copy", "aten.__and__", "aten.__or__", "aten.__xor__", "aten.type_as", "aten.clone",
              "aten.contiguous", "aten.detach", "aten.alias", "aten.masked_fill", "aten.zeros_like", "aten.ones_like",
              "aten.full_like", "aten.float_power", "aten.square", "aten.rsub", "aten.lift_fresh_copy", "aten.relu6",
              "aten.selu", "aten.gelu", "aten.log_sigmoid", "aten.softplus", "aten.hardswish", "aten.mish",
              "aten.logical_and", "aten.logical_not", "aten.where", "aten.nan_to_num", "aten.clamp",
              "aten.clip", "aten.leaky_relu"}  # fmt: skip


def follow(proof: Proof, node: fx.Node) -> Any:
    """The knowledge of a call's result: a claim, a list of claims that are all true, or a size.

    A local view may be a shard of several views of the dense model; only a later use shows which one matters. So each
    combination of the operands' claims is tried.

    Raises:
        Unproved: no combination of the operands' claims gives a claim.
    """
    several = {n: c for n in node.all_input_nodes if isinstance(c := proof.values[n], list)}
    results, failure = list[Any](), None
    for choice in itertools.islice(itertools.product(*several.values()), 64):
        proof.choice, proof.draws = dict(zip(several, choice, strict=True)), []
        try:
            value = _apply_rule(proof, node)
            results += value if isinstance(value, list) else [value]
        except Unproved as error:
            failure = failure or error
    if not results:
        assert failure is not None
        raise failure
    for key, draw in proof.draws:
        proof.terms.draws[key].remove(draw)
    proof.choice = {}
    results = list(dict.fromkeys(results))
    return results[0] if len(results) == 1 else results[:8]


def _apply_rule(proof: Proof, node: fx.Node) -> Any:
    """The knowledge of a call's result, given the current choice among its operands' claims."""
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    if target in _PARALLEL:
        arguments = dict(enumerate(args)) | kwargs
        return _PARALLEL[target](proof, Step(node, op_name(node), target, {str(k): v for k, v in arguments.items()}))
    draws = target in (ops.random_same, ops.random_per_rank)
    if draws:
        target, args = args[0], args[1:]
    target = _DENSE_OPS.get(target, target)
    name = str(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else op_name(node)
    step = Step(node, name, target, named_arguments(target, args, kwargs))
    if draws:
        return elementwise.random(proof, step)
    sizes = _computed_size(proof, step)
    if sizes is not None:
        return sizes
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _RULES.get(name, elementwise.pointwise)(proof, step)
    rule = _RULES.get(name) or (elementwise.pointwise if name in _POINTWISE else elementwise.replicated_op)
    return rule(proof, step)


def _computed_size(proof: Proof, step: Step) -> Any:
    """A size or another number that the graph computes; None for other ops."""
    name, args = step.name, step.node.args
    if name == "aten.sym_size":
        claim = proof.claim(args[0])
        return Sizes(tuple(claim.local(r)[args[1]] for r in range(proof.tp)))
    tensors = [n for n in step.node.all_input_nodes if proof.is_tensor(n)]
    is_op, is_size = isinstance(step.target, torch._ops.OpOverload), name.startswith("aten.sym_")
    if (tensors and not is_size and name != "aten.item") or (is_op and not tensors and not is_size):
        return None
    arguments = [proof.per_rank(a) for a in args]
    uniform = all(values == [values[0]] * proof.tp for values in arguments)
    known = proof.terms.sizes.get((name, tuple(proof.key(a) for a in args))) if uniform else None
    if known is not None:
        for operand in tensors:  # a number read out of a tensor
            require_replicated(proof.claim(operand))
        return Sizes((known,) * proof.tp)
    if step.target in (operator.mul, operator.floordiv) and len(args) == 2:
        sizes = [_combine_sizes(step.target, *pair) for pair in zip(*arguments, strict=True)]
        if all(s is not None for s in sizes):
            return Sizes(tuple(s for s in sizes if s is not None))
    if is_op or step.target is operator.getitem:
        return None
    return ("number", name, tuple(proof.key(a) for a in args))


def _combine_sizes(target: Any, left: Any, right: Any) -> Size | None:
    """The product or the quotient of two sizes; None for other numbers, or a quotient that is no size."""
    first, second = (Size(x) if isinstance(x, int) and x > 0 else x for x in (left, right))
    if not isinstance(first, Size) or not isinstance(second, Size):
        return None
    return first * second if target is operator.mul else first.over(second)
