"""products: proof rules for matrix products, convolutions and attention, whose dims are matched by letters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from passes.layouts.axes import Size
from passes.proof.claims import Claim, Dim, Unproved, is_partition, is_unsplit, unsplit_dims
from passes.proof.dense import equation as product_equation
from passes.proof.results import (
    align_dims,
    combine,
    combine_indexwise,
    operand_carriers,
    require_reduced,
    require_replicated,
    result_from_replicated,
    result_gradient,
)
from passes.proof.steps import Proof, Step
from passes.proof.terms import ONE, Coefficient

__all__ = ["attention", "convolution", "einsum", "flex_attention", "grouped_matmul", "solve", "weighted_sum"]


def _contract(
    proof: Proof, term: int, operands: Sequence[Claim], letters: Sequence[Sequence[str]], out: Sequence[str],
    unsplit: Collection[str] = (),
) -> Claim:  # fmt: skip
    """The claim of a product, which sums over the letters that the result lacks: a partial sum if those are split.

    Args:
        proof: the proof.
        term: the result's term.
        operands: the claims of the operands.
        letters: per operand, a letter for each dim.
        out: the result's letters.
        unsplit: the letters of dims that must not be split.
    """
    dims = align_dims(operands, letters)
    summed = [x for x in dims if x not in out]
    splits = tuple(split for x in summed for _, split in dims[x] if split is not None)
    if not splits or any(not is_unsplit(dims.get(x, ())) for x in unsplit):
        return combine(proof.terms, term, operands, letters, out, unsplit)
    result = tuple(dims.get(x, ()) for x in out)
    if any(not is_unsplit(dim) for dim in result):
        raise Unproved(
            "a product split along one dim", "one split along a contracted and another dim",
            "sums would lack other ranks' terms",
        )  # fmt: skip
    for x in summed:
        if any(not dim for c, names in zip(operands, letters) for y, dim in zip(names, c.dims) if y == x and dims[x]):
            raise Unproved(
                "operands that have the contracted dim", "one that broadcasts", "each rank would add it once"
            )
    if not is_partition(splits):
        raise Unproved(
            "every contracted index on exactly one rank", str(Claim(0, tuple(dims[x] for x in summed))),
            "the sum over the ranks would count some indices more than once or never",
        )  # fmt: skip
    result_gradient(proof.terms, term, result, True, operand_carriers(operands, letters, out, result))
    return Claim(term, result, pending=True)


def einsum(proof: Proof, step: Step) -> Claim:
    """``linear``, ``matmul``, ``addmm``, ``einsum`` and their parallel counterparts."""
    equation = product_equation(step.name, step.args, lambda n: len(proof.claim(n).dims))
    if equation is None:
        term = proof.call_term(step)
        return result_from_replicated(proof.terms, term, [require_replicated(c) for c in proof.claims(step.args)])
    operands = [proof.claim(n) for n in equation.operands]
    term = proof.find_term(equation.key([c.term for c in operands]), "a product")
    product = _contract(proof, term, operands, equation.letters, equation.out)
    weights = [Coefficient.of(proof.uniform(w)) or ONE for w in (equation.weight, *(w for _, w in equation.addends))]
    if not equation.addends and weights == [ONE]:
        return product
    return _add_bias(proof, product, weights[0], [proof.claim(n) for n, _ in equation.addends], weights[1:])


def _add_bias(
    proof: Proof, product: Claim, weight: Coefficient, addends: Sequence[Claim], weights: Sequence[Coefficient]
) -> Claim:
    """The claim of a product to which a bias or other values are added."""
    if product.pending:
        raise Unproved(
            "a bias that is added once, after the reduction", "one added before", "it would count once per rank"
        )  # fmt: skip
    return weighted_sum(proof, [(product, weight), *zip(addends, weights, strict=True)])


def weighted_sum(proof: Proof, pairs: Sequence[tuple[Claim, Coefficient]]) -> Claim:
    """The claim of a weighted sum of values, or of partial sums."""
    claims = [c for c, _ in pairs]
    rank = max(len(c.dims) for c in claims)
    shape = [Size(1)] * rank
    for claim in claims:
        for d, size in enumerate(proof.terms.shapes[claim.term], start=rank - len(claim.dims)):
            shape[d] = shape[d] if size.is_one else size
    term = proof.terms.weighted_sum([(c.term, w) for c, w in pairs], shape)
    if all(c.pending for c in claims):
        return Claim(term, unsplit_dims(shape), pending=True)
    return combine_indexwise(proof.terms, term, claims)


def convolution(proof: Proof, step: Step) -> Claim:
    """``"b i s, o i k -> b o t"``; with one group per channel ``"b c s, c 1 k -> b c t"``."""
    args = dict(step.args)
    bias, groups = args.pop("bias", None), proof.per_rank(args.pop("groups", 1))
    x, weight = proof.claim(args["input"]), proof.claim(args["weight"])
    kernel_dims = len(weight.dims) - 2
    outer, inputs, *_ = proof.terms.shapes[weight.term]
    channels = [weight.local(r)[0].number for r in range(proof.tp)]
    depthwise = inputs.is_one and outer.number > 1 and groups == channels
    count = outer.number if depthwise else proof.uniform(groups[0])
    if not depthwise and (any(g != count for g in groups) or (count != 1 and not (x.replicated and weight.replicated))):
        raise Unproved("groups of channels that are unsplit", "split ones", "channels would be mixed with others")
    term = proof.find_term(
        (step.name, proof.arguments_key(args | ({"groups": count} if count != 1 else {}))), "a convolution"
    )
    batch = ["b"] * (len(x.dims) - kernel_dims - 1)
    positions, kernel, after = ([f"{letter}{i}" for i in range(kernel_dims)] for letter in "skt")
    inner, out, single = ("c", "c", "one") if depthwise else ("i", "o", "i")
    letters = [[*batch, inner, *positions], [out, single, *kernel]]
    product = _contract(proof, term, [x, weight], letters, [*batch, out, *after], unsplit=[*positions, *kernel])
    first = len(product.dims) - kernel_dims
    dims = (*product.dims[:first], *unsplit_dims(proof.terms.shapes[term])[first:])
    product = Claim(term, dims, product.grad, product.pending)
    if bias is None:
        return product
    vector = proof.claim(bias)
    shaped = proof.terms.passing_view(vector.term, (*proof.terms.shapes[vector.term], *[Size(1)] * kernel_dims))
    return _add_bias(proof, product, ONE, [Claim(shaped, (*vector.dims, *[()] * kernel_dims), vector.grad)], [ONE])


def grouped_matmul(proof: Proof, step: Step) -> Claim:
    """``"t k, e k n -> t n"``: runs of rows, each multiplied by its own matrix."""
    rows, matrices, *rest = proof.claims(step.args)
    term = proof.call_term(step)
    if len(rows.dims) != 2 or len(matrices.dims) != 3 or (rows.replicated and matrices.replicated):
        return result_from_replicated(proof.terms, term, [require_replicated(c) for c in (rows, matrices, *rest)])
    for claim in rest:
        require_replicated(claim)
    return _contract(proof, term, [rows, matrices], ["tk", "ekn"], "tn", unsplit="te")


def solve(proof: Proof, step: Step) -> Claim:
    """The solution of a triangular system, whose matrix dims are unsplit."""
    system, right = proof.claims(step.args)
    most = max(len(system.dims), len(right.dims)) - 2
    lead = [[f"b{i}" for i in range(most - len(c.dims) + 2, most)] for c in (system, right)]
    ends = ("ij", "jk", "ik") if step.args.get("left", True) else ("ij", "ki", "kj")
    out = [*(f"b{i}" for i in range(most)), *ends[2]]
    letters = [[*lead[0], *ends[0]], [*lead[1], *ends[1]]]
    return combine(proof.terms, proof.call_term(step), [system, right], letters, out, unsplit="ij")


def attention(proof: Proof, step: Step) -> Claim:
    """Scaled dot-product attention, which each rank computes for its own heads."""
    args = step.args
    operands = [proof.claim(args[k]) for k in ("query", "key", "value", "attn_mask") if args.get(k) is not None]
    if args.get("dropout_p", 0.0):
        term = proof.next_draw((step.name, proof.arguments_key(args)))
        proof.check_draw(step, operands[0])
    else:
        term = proof.call_term(step)
    lead = [f"b{i}" for i in range(max(len(c.dims) for c in operands) - 2)]
    letters = [[*lead, *ends][-len(c.dims) :] for c, ends in zip(operands, ("qd", "kd", "kv", "qk"))]
    if args.get("enable_gqa"):
        return _grouped_queries(proof, term, operands, letters, [*lead, "q", "v"])
    unsplit = "qkd" if args.get("is_causal") else "kd"  # a causal mask depends on the query's position
    return combine(proof.terms, term, operands, letters, [*lead, "q", "v"], unsplit=unsplit)


def flex_attention(proof: Proof, step: Step) -> Claim:
    """flex_attention, split by heads or by batch if its functions do not read the index of the head or of the batch."""
    query, key, value, scores, (*sparse, mask), *_ = step.node.args
    operands = [require_reduced(proof.claim(n)) for n in (query, key, value)]
    rest = [require_replicated(c) for c in proof.claims(list(step.node.args[3:]))]
    term = proof.call_term(step)
    if all(c.replicated for c in operands):
        return result_from_replicated(proof.terms, term, [*operands, *rest])
    sizes = [proof.terms.shapes[proof.claim(n).term] for n in sparse if proof.is_tensor(n)]
    for dim in (0, 1):
        broadcasts = all(len(s) < 3 or s[dim].is_one for s in sizes)
        reads_index = _reads_argument(proof, scores, dim + 1) or _reads_argument(proof, mask, dim) or not broadcasts
        if reads_index and any(not is_unsplit(c.dims[dim]) for c in operands):
            raise Unproved(
                "functions that do not read the index of the head", "one that does", "heads would be taken for others"
            )  # fmt: skip
    if any(c.grad is not None for c in rest):
        raise Unproved("masks without gradients", "others", "their gradients would be partial sums")
    letters = [[*"bh", *ends] for ends in ("qd", "kd", "kv")]
    if proof.terms.shapes[operands[0].term][1] != proof.terms.shapes[operands[1].term][1]:
        return _grouped_queries(proof, term, operands, letters, list("bhqv"))
    return combine(proof.terms, term, operands, letters, "bhqv", unsplit="qkd")


def _reads_argument(proof: Proof, function: Any, position: int) -> bool:
    """Whether a function that the graph calls reads an argument."""
    region = proof.values[function]
    graph = proof.terms.regions.get(region[1]) if isinstance(region, tuple) else None
    inputs = [n for n in graph.nodes if n.op == "placeholder"] if graph is not None else []
    return not inputs or bool(inputs[position].users)


def _grouped_queries(
    proof: Proof, term: int, operands: Sequence[Claim], letters: Sequence[Sequence[str]], out: Sequence[str]
) -> Claim:
    """Attention in which several query heads share a key-value head: on every rank the one of the dense model."""
    query, key, value, *_ = operands
    heads, shared = proof.terms.shapes[query.term][-3], proof.terms.shapes[key.term][-3]
    group = heads.over(shared)
    if group is None or not heads.static or key.dims[-3] != value.dims[-3]:
        raise Unproved("keys and values of the same heads", "others", "queries would attend to other heads")
    for rank in range(proof.tp):
        query_heads, key_heads = _heads(query.dims[-3], heads.number, rank), _heads(key.dims[-3], shared.number, rank)
        used_heads = np.repeat(key_heads, len(query_heads) // len(key_heads)) if len(key_heads) else key_heads
        dense_heads = query_heads // group.number
        if not np.array_equal(used_heads, dense_heads):
            raise Unproved(
                f"key heads {dense_heads.tolist()} for query heads {query_heads.tolist()} on rank {rank}",
                f"{used_heads.tolist()}", "queries would attend to another group's keys",
            )  # fmt: skip
    grouped = [[*x[:-3], "g", *x[-2:]] if i in (1, 2) else x for i, x in enumerate(letters)]
    for claim in (key, value):
        require_reduced(claim)
    keys_values = [Claim(c.term, (*c.dims[:-3], (), *c.dims[-2:]), c.grad) for c in (key, value)]
    return combine(proof.terms, term, [query, *keys_values, *operands[3:]], grouped, out, unsplit="qkd")


def _heads(dim: Dim, size: int, rank: int) -> np.ndarray:
    """The indices of the heads that a rank holds."""
    if is_unsplit(dim):
        return np.arange(size)
    ((_, split),) = dim
    assert split is not None
    return split.ranks[rank]
