"""reductions: proof rules for reductions, scans and norms."""

from __future__ import annotations

from collections.abc import Sequence

from passes.layouts.axes import Size, product
from passes.proof.claims import Claim, Unproved, is_partition, is_unsplit, unsplit_dims
from passes.proof.dense import dims_of
from passes.proof.elementwise import replicated_op
from passes.proof.products import weighted_sum
from passes.proof.results import combine, require_reduced, result_from_one, result_gradient
from passes.proof.steps import Proof, Step
from passes.proof.terms import Coefficient

__all__ = ["complex_pairs", "dynamic_slice", "norm", "pad_or_roll", "reduction", "scan", "sum_or_mean"]


def mix_dims(proof: Proof, claim: Claim, dims: Sequence[int], term: int) -> Claim:
    """The claim of an op that mixes some dims, which must be unsplit, and treats each index of the others alike."""
    if any(not is_unsplit(claim.dims[d]) for d in dims):
        raise Unproved(
            "the dims that the op mixes to be unsplit", str(claim), "each rank would mix its own shard only"
        )  # fmt: skip
    shape = proof.terms.shapes[term]
    if len(shape) == len(claim.dims):
        new = unsplit_dims(shape)
        return result_from_one(
            proof.terms, term, [new[d] if d in dims else dim for d, dim in enumerate(claim.dims)], claim
        )
    result = [dim for d, dim in enumerate(claim.dims) if d not in dims]
    if len(result) != len(shape):
        raise Unproved("a result of known dims", "another", "its layout is not known")
    return result_from_one(proof.terms, term, result, claim)


def _mix_operand(proof: Proof, step: Step, dims: Sequence[int]) -> Claim:
    """The claim of an op that mixes some dims of its only tensor; several tensors must be replicated."""
    operands = proof.claims(step.args)
    if len(operands) != 1:
        return replicated_op(proof, step)
    return mix_dims(proof, require_reduced(operands[0]), dims, proof.call_term(step))


def dynamic_slice(proof: Proof, step: Step) -> Claim:
    """A slice whose bounds are known at run time only: the same on all ranks, along an unsplit dim."""
    claim = proof.claims(step.args)[0]
    dims = step.args["dims"] if step.name == "aten.flip" else step.args.get("dim", 0)
    return _mix_operand(proof, step, dims_of(dims, len(claim.dims)))


def scan(proof: Proof, step: Step) -> Claim:
    """Softmax, cumulative sums and triangles, which mix one dim or two."""
    rank = len(proof.claims(step.args)[0].dims)
    if step.name in ("aten.tril", "aten.triu"):
        return _mix_operand(proof, step, (rank - 2, rank - 1))
    return _mix_operand(proof, step, dims_of(proof.uniform(step.args["dim"]), rank))


def reduction(proof: Proof, step: Step) -> Claim:
    """Reductions other than sums."""
    rank = len(proof.claims(step.args)[0].dims)
    dims = next((step.args[k] for k in ("dim", "dims", "1") if k in step.args), None)
    return _mix_operand(proof, step, dims_of(dims, rank))


def pad_or_roll(proof: Proof, step: Step) -> Claim:
    """Padding and rolling, along unsplit dims."""
    rank = len(proof.claims(step.args)[0].dims)
    if step.name == "aten.roll":
        return _mix_operand(proof, step, dims_of(step.args.get("dims"), rank))
    return _mix_operand(proof, step, sorted({rank - 1 - i // 2 for i, a in enumerate(step.args["pad"]) if a != 0}))


def sum_or_mean(proof: Proof, step: Step) -> Claim:
    """A sum, which is a partial sum if a summed dim is split, or a mean of unsplit dims."""
    claim = require_reduced(proof.claim(step.args["self"]))
    dims, keep = dims_of(step.args.get("dim"), len(claim.dims)), bool(step.args.get("keepdim", False))
    term = proof.find_term(("total", claim.term, dims, keep, step.args.get("dtype")), "a sum")
    summed = tuple(split for d in dims for _, split in claim.dims[d] if split is not None)
    if step.name == "aten.mean":
        count = Coefficient.of(product(proof.terms.shapes[claim.term][d] for d in dims))
        factor = count.inverse() if count else None
        assert factor is not None
        return weighted_sum(proof, [(mix_dims(proof, claim, dims, term), factor)])
    if not summed:
        return mix_dims(proof, claim, dims, term)
    if any(not is_unsplit(dim) for d, dim in enumerate(claim.dims) if d not in dims):
        raise Unproved("a value split along one dim only", str(claim), "sums would lack other ranks' terms")
    result = tuple(() if d in dims else dim for d, dim in enumerate(claim.dims) if keep or d not in dims)
    result_gradient(proof.terms, term, result, True, [(claim, False)])
    if is_partition(summed):
        return Claim(term, result, pending=True)
    if len(summed) > 1:
        raise Unproved("every index on one rank", str(claim), "the sum would count some indices more than once")
    return Claim(term, result, unweighted=summed[0])


def norm(proof: Proof, step: Step) -> Claim:
    """Layer and RMS norms over unsplit features."""
    operands = proof.claims(step.args)
    rank, count = len(operands[0].dims), len(step.args["normalized_shape"])
    names = [f"d{i}" for i in range(rank)]
    letters = [names[rank - len(c.dims) :] for c in operands]
    return combine(proof.terms, proof.call_term(step), operands, letters, names, unsplit=names[rank - count :])


def complex_pairs(proof: Proof, step: Step) -> Claim:
    """``"... 2 -> ..."`` and back: the real and the imaginary part of a number are on one rank."""
    claim = require_reduced(proof.claim(step.args["self"]))
    term = proof.call_term(step)
    if step.name == "aten.view_as_complex":
        return mix_dims(proof, claim, [len(claim.dims) - 1], term)
    return result_from_one(proof.terms, term, (*claim.dims, ((Size(2), None),)), claim)
