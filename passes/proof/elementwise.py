"""elementwise: proof rules for ops that work index by index, and ops that need whole values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from passes.proof.claims import Claim, Unproved, wholly
from passes.proof.products import added, attention
from passes.proof.results import combine_indexwise, require_reduced, result_from_replicated
from passes.proof.steps import Proof, Step
from passes.proof.terms import ONE, Coefficient, plain

__all__ = ["arithmetic", "general", "getitem", "pointwise", "random"]

aten = torch.ops.aten


def general(proof: Proof, step: Step) -> Claim:
    """An op of whole values: every rank computes all of it."""
    operands = proof.tensors(step.args)
    for claim in operands:
        if not require_reduced(claim, "an operand").whole:
            raise Unproved(
                f"whole operands, as nothing is known of {step.name} on parts", f"one that is {claim}",
                "each rank would compute something else of its own part",
            )  # fmt: skip
    return result_from_replicated(proof.terms, proof.called(step), operands)


def getitem(proof: Proof, step: Step) -> Any:
    """One of several results."""
    source, at = step.node.args
    found = proof.value(source)
    if isinstance(found, tuple) and found and not isinstance(found[0], str):
        return found[at]
    term = proof.called(step)
    grad = proof.claim(source).grad
    return Claim(term, wholly(proof.terms.shapes[term]), grad if proof.terms.grads[term] else None)


def pointwise(proof: Proof, step: Step) -> Claim:
    """Ops that compute each index from the same index of their operands, which broadcast."""
    operands = proof.tensors(step.args)
    if step.name == "aten.type_as" or step.target is aten.to.other:
        operands = operands[:1]
    return combine_indexwise(proof.terms, proof.called(step), operands)


def random(proof: Proof, step: Step) -> Claim:
    """Random numbers: alike on whole values, each rank's own on what no two ranks hold."""
    if step.name == "aten.scaled_dot_product_attention":
        return attention(proof, step)
    operands = [proof.drawn_from(step, c) for c in proof.tensors(step.args)]
    term = proof.drawn((step.name, proof.named(step.args)))
    result = combine_indexwise if operands else result_from_replicated
    return proof.drawn_from(step, result(proof.terms, term, operands))


def arithmetic(proof: Proof, step: Step) -> Claim:
    """Sums and multiples by numbers, of values or of pending sums."""
    args, name = step.args, step.name
    minus = Coefficient.of(-1) or ONE
    if name == "aten.neg":
        return added(proof, [(proof.claim(args["self"]), minus)])
    if set(args) - {"self", "other", "alpha"}:
        return pointwise(proof, step)
    left, right = args["self"], args["other"]
    if name in ("aten.mul", "aten.div"):
        if name == "aten.mul" and not proof.is_tensor(left):
            left, right = right, left
        return pointwise(proof, step) if proof.is_tensor(right) else _scaled(proof, step, proof.claim(left), right)
    weight = Coefficient.of(proof.same(args.get("alpha", 1))) or ONE
    pairs = []
    for item, by in ((left, ONE), (right, weight * minus if name == "aten.sub" else weight)):
        if proof.is_tensor(item):
            pairs.append((proof.claim(item), by))
            continue
        number = Coefficient.of(proof.same(item))
        if number is None:
            return pointwise(proof, step)
        pairs.append((Claim(proof.terms.number(), ()), number * by))
    return added(proof, pairs)


def _scaled(proof: Proof, step: Step, claim: Claim, other: Any) -> Claim:
    """A multiple by a number, or, of a sum that counts some indices on several ranks, by a number for each rank."""
    if claim.uncounted is not None:
        return _counted(claim, proof.ranks(other), step.name)
    known = proof.terms.find((step.name, proof.named(step.args)))
    if known is not None and not claim.pending:  # of integers, say
        return combine_indexwise(proof.terms, known, [claim])
    by = Coefficient.of(proof.same(other))
    by = by.inverse() if by is not None and step.name == "aten.div" else by
    return pointwise(proof, step) if by is None else added(proof, [(claim, by)])


def _counted(claim: Claim, times: Sequence[Any], name: str) -> Claim:
    """A sum over indices that several ranks hold, each counted as often as its rank is told."""
    split = claim.uncounted
    assert split is not None
    counts = np.zeros(split.size)
    for mine, by in zip(split.ranks, times, strict=True):
        np.add.at(counts, mine, plain(by) if name == "aten.mul" else 1 / plain(by))
    if (counts != 1).any():
        found = f"some that count {sorted(set(counts.tolist()))[:4]} times"
        raise Unproved("every index to count once over the ranks", found, "the sum would be another")
    return Claim(claim.term, claim.dims, pending=True)
