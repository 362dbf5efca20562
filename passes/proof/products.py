"""Products, convolutions, attention: ops whose dims are matched by letters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from passes.layouts.axes import Size
from passes.proof.claims import Claim, Dim, Unproved, counted_once, is_whole, wholly
from passes.proof.dense import equation
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

__all__ = ["added", "attention", "convolution", "einsum", "flex_attention", "grouped", "solve"]


def _product(
    proof: Proof, term: int, operands: Sequence[Claim], letters: Sequence[Sequence[str]], out: Sequence[str],
    whole: Collection[str] = (),
) -> Claim:  # fmt: skip
    """The claim of a product: it sums over the letters that the result lacks, and is pending if those are split.

    Args:
        proof: the proof.
        term: the result.
        operands: its tensors.
        letters: per operand, a letter for each dim.
        out: the result's letters.
        whole: letters of dims that no rank may hold a part of.
    """
    dims = align_dims(operands, letters)
    summed = [x for x in dims if x not in out]
    over = tuple(split for x in summed for _, split in dims[x] if split is not None)
    if not over or any(not is_whole(dims.get(x, ())) for x in whole):
        return combine(proof.terms, term, operands, letters, out, whole)
    result = tuple(dims.get(x, ()) for x in out)
    if any(not is_whole(dim) for dim in result):
        raise Unproved(
            "a product split along one dim", "one split along a contracted and a kept one", "sums would miss parts"
        )  # fmt: skip
    for x in summed:
        if any(not dim for c, each in zip(operands, letters) for y, dim in zip(each, c.dims) if y == x and dims[x]):
            raise Unproved("operands that have the contracted dim", "one that broadcasts", "ranks would add it each")
    if not counted_once(over):
        raise Unproved(
            "every contracted index on exactly one rank", str(Claim(0, tuple(dims[x] for x in summed))),
            "the sum over the ranks would count some indices more than once or never",
        )  # fmt: skip
    result_gradient(proof.terms, term, result, True, operand_carriers(operands, letters, out, result))
    return Claim(term, result, pending=True)


def einsum(proof: Proof, step: Step) -> Claim:
    """``linear``, ``matmul``, ``addmm``, ``einsum`` and their parallel counterparts."""
    found = equation(step.name, step.args, lambda n: len(proof.claim(n).dims))
    if found is None:
        term = proof.called(step)
        return result_from_replicated(proof.terms, term, [require_replicated(c) for c in proof.tensors(step.args)])
    operands = [proof.claim(n) for n in found.operands]
    term = proof.known(found.key([c.term for c in operands]), "a product")
    product = _product(proof, term, operands, found.letters, found.out)
    weights = [Coefficient.of(proof.same(w)) or ONE for w in (found.weight, *(w for _, w in found.added))]
    if not found.added and weights == [ONE]:
        return product
    return _with(proof, product, weights[0], [proof.claim(n) for n, _ in found.added], weights[1:])


def _with(
    proof: Proof, product: Claim, weight: Coefficient, addends: Sequence[Claim], weights: Sequence[Coefficient]
) -> Claim:
    """A product with what is added to it."""
    if product.pending:
        raise Unproved(
            "a bias that is added once, after the reduction", "one added before", "it would count once per rank"
        )  # fmt: skip
    return added(proof, [(product, weight), *zip(addends, weights, strict=True)])


def added(proof: Proof, pairs: Sequence[tuple[Claim, Coefficient]]) -> Claim:
    """A weighted sum of values, or of pending sums."""
    claims = [c for c, _ in pairs]
    rank = max(len(c.dims) for c in claims)
    shape = [Size(1)] * rank
    for claim in claims:
        for d, size in enumerate(proof.terms.shapes[claim.term], start=rank - len(claim.dims)):
            shape[d] = shape[d] if size.is_one else size
    term = proof.terms.added([(c.term, w) for c, w in pairs], shape)
    if all(c.pending for c in claims):
        return Claim(term, wholly(shape), pending=True)
    return combine_indexwise(proof.terms, term, claims)


def convolution(proof: Proof, step: Step) -> Claim:
    """``"b i s, o i k -> b o t"``; with a group for each channel ``"b c s, c 1 k -> b c t"``."""
    args = dict(step.args)
    bias, groups = args.pop("bias", None), proof.ranks(args.pop("groups", 1))
    x, weight = proof.claim(args["input"]), proof.claim(args["weight"])
    slid = len(weight.dims) - 2
    outer, each, *_ = proof.terms.shapes[weight.term]
    held = [weight.local(r)[0].number for r in range(proof.tp)]
    depthwise = each.is_one and outer.number > 1 and groups == held
    count = outer.number if depthwise else proof.same(groups[0])
    if not depthwise and (any(g != count for g in groups) or (count != 1 and not (x.whole and weight.whole))):
        raise Unproved("groups that are whole", "groups that are split", "channels would be mixed with others")
    term = proof.known((step.name, proof.named(args | ({"groups": count} if count != 1 else {}))), "a convolution")
    batch = ["b"] * (len(x.dims) - slid - 1)
    around, kernel, after = ([f"{letter}{i}" for i in range(slid)] for letter in "skt")
    inner, out, single = ("c", "c", "one") if depthwise else ("i", "o", "i")
    letters = [[*batch, inner, *around], [out, single, *kernel]]
    product = _product(proof, term, [x, weight], letters, [*batch, out, *after], whole=[*around, *kernel])
    dims = (*product.dims[: len(product.dims) - slid], *wholly(proof.terms.shapes[term])[len(product.dims) - slid :])
    product = Claim(term, dims, product.grad, product.pending)
    if bias is None:
        return product
    given = proof.claim(bias)
    shaped = proof.terms.viewed(given.term, (*proof.terms.shapes[given.term], *[Size(1)] * slid))
    return _with(proof, product, ONE, [Claim(shaped, (*given.dims, *[()] * slid), given.grad)], [ONE])


def grouped(proof: Proof, step: Step) -> Claim:
    """``"t k, e k n -> t n"``: runs of rows, each with a matrix of its own."""
    rows, matrices, *rest = proof.tensors(step.args)
    term = proof.called(step)
    if len(rows.dims) != 2 or len(matrices.dims) != 3 or (rows.whole and matrices.whole):
        return result_from_replicated(proof.terms, term, [require_replicated(c) for c in (rows, matrices, *rest)])
    for claim in rest:
        require_replicated(claim)
    return _product(proof, term, [rows, matrices], ["tk", "ekn"], "tn", whole="te")


def solve(proof: Proof, step: Step) -> Claim:
    """A triangular system, whose own dims are whole."""
    system, right = proof.tensors(step.args)
    most = max(len(system.dims), len(right.dims)) - 2
    lead = [[f"b{i}" for i in range(most - len(c.dims) + 2, most)] for c in (system, right)]
    ends = ("ij", "jk", "ik") if step.args.get("left", True) else ("ij", "ki", "kj")
    out = [*(f"b{i}" for i in range(most)), *ends[2]]
    letters = [[*lead[0], *ends[0]], [*lead[1], *ends[1]]]
    return combine(proof.terms, proof.called(step), [system, right], letters, out, whole="ij")


def attention(proof: Proof, step: Step) -> Claim:
    """Scaled dot-product attention: a rank attends with its own heads."""
    args = step.args
    operands = [proof.claim(args[k]) for k in ("query", "key", "value", "attn_mask") if args.get(k) is not None]
    if args.get("dropout_p", 0.0):
        term = proof.drawn((step.name, proof.named(args)))
        proof.drawn_from(step, operands[0])
    else:
        term = proof.called(step)
    lead = [f"b{i}" for i in range(max(len(c.dims) for c in operands) - 2)]
    letters = [[*lead, *ends][-len(c.dims) :] for c, ends in zip(operands, ("qd", "kd", "kv", "qk"))]
    if args.get("enable_gqa"):
        return _grouped_queries(proof, term, operands, letters, [*lead, "q", "v"])
    whole = "qkd" if args.get("is_causal") else "kd"  # then a query's place among the others counts
    return combine(proof.terms, term, operands, letters, [*lead, "q", "v"], whole=whole)


def flex_attention(proof: Proof, step: Step) -> Claim:
    """flex_attention by heads, where the functions that it calls do not ask which head, or which batch, they are at."""
    query, key, value, scores, (*sparse, mask), *_ = step.node.args
    operands = [require_reduced(proof.claim(n)) for n in (query, key, value)]
    rest = [require_replicated(c) for c in proof.tensors(list(step.node.args[3:]))]
    term = proof.called(step)
    if all(c.whole for c in operands):
        return result_from_replicated(proof.terms, term, [*operands, *rest])
    sizes = [proof.terms.shapes[proof.claim(n).term] for n in sparse if proof.is_tensor(n)]
    for dim in (0, 1):
        blind = all(len(s) < 3 or s[dim].is_one for s in sizes)
        told = _asks(proof, scores, dim + 1) or _asks(proof, mask, dim) or not blind
        if told and any(not is_whole(c.dims[dim]) for c in operands):
            raise Unproved(
                "functions that do not ask which head they are at", "one that does", "heads would be taken for others"
            )  # fmt: skip
    if any(c.grad is not None for c in rest):
        raise Unproved("masks without gradients", "others", "their gradients would be in parts")
    letters = [[*"bh", *ends] for ends in ("qd", "kd", "kv")]
    if proof.terms.shapes[operands[0].term][1] != proof.terms.shapes[operands[1].term][1]:
        return _grouped_queries(proof, term, operands, letters, list("bhqv"))
    return combine(proof.terms, term, operands, letters, "bhqv", whole="qkd")


def _asks(proof: Proof, function: Any, position: int) -> bool:
    """Whether a function that the graph calls reads an argument."""
    found = proof.values[function]
    graph = proof.terms.regions.get(found[1]) if isinstance(found, tuple) else None
    inputs = [n for n in graph.nodes if n.op == "placeholder"] if graph is not None else []
    return not inputs or bool(inputs[position].users)


def _grouped_queries(
    proof: Proof, term: int, operands: Sequence[Claim], letters: Sequence[Sequence[str]], out: Sequence[str]
) -> Claim:
    """Attention in which a head of keys and values serves several of the queries: the groups must be the dense ones."""
    query, key, value, *_ = operands
    heads, shared = proof.terms.shapes[query.term][-3], proof.terms.shapes[key.term][-3]
    each = heads.over(shared)
    if each is None or not heads.static or key.dims[-3] != value.dims[-3]:
        raise Unproved("keys and values of the same heads", "others", "queries would meet other heads")
    for rank in range(proof.tp):
        mine, theirs = _heads(query.dims[-3], heads.number, rank), _heads(key.dims[-3], shared.number, rank)
        served = np.repeat(theirs, len(mine) // len(theirs)) if len(theirs) else theirs
        if not np.array_equal(served, mine // each.number):
            raise Unproved(
                f"key heads {(mine // each.number).tolist()} for query heads {mine.tolist()} on rank {rank}",
                f"{served.tolist()}", "queries would attend to another group's keys",
            )  # fmt: skip
    hidden = [[*x[:-3], "g", *x[-2:]] if i in (1, 2) else x for i, x in enumerate(letters)]
    for claim in (key, value):
        require_reduced(claim)
    alike = [Claim(c.term, (*c.dims[:-3], (), *c.dims[-2:]), c.grad) for c in (key, value)]
    return combine(proof.terms, term, [query, *alike, *operands[3:]], hidden, out, whole="qkd")


def _heads(dim: Dim, size: int, rank: int) -> np.ndarray:
    """The heads that a rank holds."""
    if is_whole(dim):
        return np.arange(size)
    ((_, split),) = dim
    assert split is not None
    return split.ranks[rank]
