"""elementwise: proof rules for ops that work index by index, and for ops that need replicated operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from passes.proof.claims import Claim, Unproved, unsplit_dims
from passes.proof.products import attention, weighted_sum
from passes.proof.results import combine_indexwise, require_reduced, result_from_replicated
from passes.proof.steps import Proof, Step
from passes.proof.terms import ONE, Coefficient, static_int

__all__ = ["arithmetic", "getitem", "pointwise", "random", "replicated_op"]

aten = torch.ops.aten


def replicated_op(proof: Proof, step: Step) -> Claim:
    """An op on replicated operands, which every rank computes in full."""
    operands = proof.claims(step.args)
    for claim in operands:
        if not require_reduced(claim, "an operand").replicated:
            raise Unproved(
                f"replicated operands, as no rule says what {step.name} computes on shards", f"one that is {claim}",
                "each rank would compute something else from its own shard",
            )  # fmt: skip
    return result_from_replicated(proof.terms, proof.call_term(step), operands)


def getitem(proof: Proof, step: Step) -> Any:
    """One of several results."""
    source, position = step.node.args
    value = proof.value(source)
    if isinstance(value, tuple) and value and not isinstance(value[0], str):
        return value[position]
    term = proof.call_term(step)
    grad = proof.claim(source).grad
    return Claim(term, unsplit_dims(proof.terms.shapes[term]), grad if proof.terms.grads[term] else None)


def pointwise(proof: Proof, step: Step) -> Claim:
    """Ops that compute each index from the same index of their operands, which broadcast."""
    operands = proof.claims(step.args)
    if step.name == "aten.type_as" or step.target is aten.to.other:
        operands = operands[:1]
    return combine_indexwise(proof.terms, proof.call_term(step), operands)


def random(proof: Proof, step: Step) -> Claim:
    """Random numbers: the same on all ranks for replicated values, each rank's own for disjoint shards."""
    if step.name == "aten.scaled_dot_product_attention":
        return attention(proof, step)
    operands = [proof.check_draw(step, c) for c in proof.claims(step.args)]
    term = proof.next_draw((step.name, proof.arguments_key(step.args)))
    result = combine_indexwise if operands else result_from_replicated
    return proof.check_draw(step, result(proof.terms, term, operands))


def arithmetic(proof: Proof, step: Step) -> Claim:
    """Sums, and multiples by numbers, of values or of partial sums."""
    args, name = step.args, step.name
    minus = Coefficient.of(-1) or ONE
    if name == "aten.neg":
        return weighted_sum(proof, [(proof.claim(args["self"]), minus)])
    if set(args) - {"self", "other", "alpha"}:
        return pointwise(proof, step)
    left, right = args["self"], args["other"]
    if name in ("aten.mul", "aten.div"):
        if name == "aten.mul" and not proof.is_tensor(left):
            left, right = right, left
        return pointwise(proof, step) if proof.is_tensor(right) else _scale(proof, step, proof.claim(left), right)
    weight = Coefficient.of(proof.uniform(args.get("alpha", 1))) or ONE
    pairs = []
    for item, factor in ((left, ONE), (right, weight * minus if name == "aten.sub" else weight)):
        if proof.is_tensor(item):
            pairs.append((proof.claim(item), factor))
            continue
        number = Coefficient.of(proof.uniform(item))
        if number is None:
            return pointwise(proof, step)
        pairs.append((Claim(proof.terms.number(), ()), number * factor))
    return weighted_sum(proof, pairs)


def _scale(proof: Proof, step: Step, claim: Claim, other: Any) -> Claim:
    """A multiple by a number; for a sum over indices that several ranks hold, by a weight for each rank."""
    if claim.unweighted is not None:
        return _apply_weights(claim, proof.per_rank(other), step.name)
    known = proof.terms.find((step.name, proof.arguments_key(step.args)))
    if known is not None and not claim.pending:  # such as a multiple of integers
        return combine_indexwise(proof.terms, known, [claim])
    factor = Coefficient.of(proof.uniform(other))
    factor = factor.inverse() if factor is not None and step.name == "aten.div" else factor
    return pointwise(proof, step) if factor is None else weighted_sum(proof, [(claim, factor)])


def _apply_weights(claim: Claim, weights: Sequence[Any], name: str) -> Claim:
    """A sum over indices that several ranks hold, multiplied by each rank's weight: a partial sum."""
    split = claim.unweighted
    assert split is not None
    counts = np.zeros(split.size)
    for indices, weight in zip(split.ranks, weights, strict=True):
        np.add.at(counts, indices, static_int(weight) if name == "aten.mul" else 1 / static_int(weight))
    if (counts != 1).any():
        counted = f"some that count {sorted(set(counts.tolist()))[:4]} times"
        raise Unproved("every index to count once over all ranks", counted, "the sum would be wrong")
    return Claim(claim.term, claim.dims, pending=True)
