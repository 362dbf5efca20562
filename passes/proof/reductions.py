"""reductions: proof rules for reductions, scans and norms."""

from __future__ import annotations

from collections.abc import Sequence

from passes.layouts.axes import Size, product
from passes.proof.claims import Claim, Unproved, counted_once, is_whole, wholly
from passes.proof.dense import dims_of
from passes.proof.elementwise import general
from passes.proof.products import added
from passes.proof.results import combine, require_reduced, result_from_one, result_gradient
from passes.proof.steps import Proof, Step
from passes.proof.terms import Coefficient

__all__ = ["complex_pairs", "norm", "reduced", "scan", "shifted", "sliced", "summed"]


def along(proof: Proof, claim: Claim, dims: Sequence[int], term: int) -> Claim:
    """An op that mixes some dims, which must be whole, and leaves the others in their places."""
    if any(not is_whole(claim.dims[d]) for d in dims):
        raise Unproved(
            "the dims that the op mixes to be whole", str(claim), "each rank would mix its own part only"
        )  # fmt: skip
    shape = proof.terms.shapes[term]
    if len(shape) == len(claim.dims):
        new = wholly(shape)
        return result_from_one(
            proof.terms, term, [new[d] if d in dims else dim for d, dim in enumerate(claim.dims)], claim
        )
    result = [dim for d, dim in enumerate(claim.dims) if d not in dims]
    if len(result) != len(shape):
        raise Unproved("a result of known dims", "another", "what ranks hold of it is not known")
    return result_from_one(proof.terms, term, result, claim)


def _mixing(proof: Proof, step: Step, dims: Sequence[int]) -> Claim:
    """An op of one tensor that mixes some of its dims; of several, one of whole values."""
    operands = proof.tensors(step.args)
    if len(operands) != 1:
        return general(proof, step)
    return along(proof, require_reduced(operands[0]), dims, proof.called(step))


def sliced(proof: Proof, step: Step) -> Claim:
    """A part with bounds known at run time: the same on all ranks, of dims that are whole."""
    claim = proof.tensors(step.args)[0]
    dims = step.args["dims"] if step.name == "aten.flip" else step.args.get("dim", 0)
    return _mixing(proof, step, dims_of(dims, len(claim.dims)))


def scan(proof: Proof, step: Step) -> Claim:
    """Softmax, cumulative sums, triangles: one dim or two are mixed."""
    rank = len(proof.tensors(step.args)[0].dims)
    if step.name in ("aten.tril", "aten.triu"):
        return _mixing(proof, step, (rank - 2, rank - 1))
    return _mixing(proof, step, dims_of(proof.same(step.args["dim"]), rank))


def reduced(proof: Proof, step: Step) -> Claim:
    """Reductions other than sums."""
    rank = len(proof.tensors(step.args)[0].dims)
    given = next((step.args[k] for k in ("dim", "dims", "1") if k in step.args), None)
    return _mixing(proof, step, dims_of(given, rank))


def shifted(proof: Proof, step: Step) -> Claim:
    """Padding and rolling: the dims that change are whole."""
    rank = len(proof.tensors(step.args)[0].dims)
    if step.name == "aten.roll":
        return _mixing(proof, step, dims_of(step.args.get("dims"), rank))
    return _mixing(proof, step, sorted({rank - 1 - i // 2 for i, a in enumerate(step.args["pad"]) if a != 0}))


def summed(proof: Proof, step: Step) -> Claim:
    """A sum, pending where what is summed is split; a mean of whole dims."""
    claim = require_reduced(proof.claim(step.args["self"]))
    dims, keep = dims_of(step.args.get("dim"), len(claim.dims)), bool(step.args.get("keepdim", False))
    term = proof.known(("total", claim.term, dims, keep, step.args.get("dtype")), "a sum")
    over = tuple(split for d in dims for _, split in claim.dims[d] if split is not None)
    if step.name == "aten.mean":
        count = Coefficient.of(product(proof.terms.shapes[claim.term][d] for d in dims))
        by = count.inverse() if count else None
        assert by is not None
        return added(proof, [(along(proof, claim, dims, term), by)])
    if not over:
        return along(proof, claim, dims, term)
    if any(not is_whole(dim) for d, dim in enumerate(claim.dims) if d not in dims):
        raise Unproved("a sum of what is split along one dim", str(claim), "sums would miss parts")
    result = tuple(() if d in dims else dim for d, dim in enumerate(claim.dims) if keep or d not in dims)
    result_gradient(proof.terms, term, result, True, [(claim, False)])
    if counted_once(over):
        return Claim(term, result, pending=True)
    if len(over) > 1:
        raise Unproved("every index on one rank", str(claim), "the sum would count some more than once")
    return Claim(term, result, uncounted=over[0])


def norm(proof: Proof, step: Step) -> Claim:
    """Layer and RMS norms over whole features."""
    operands = proof.tensors(step.args)
    rank, count = len(operands[0].dims), len(step.args["normalized_shape"])
    names = [f"d{i}" for i in range(rank)]
    letters = [names[rank - len(c.dims) :] for c in operands]
    return combine(proof.terms, proof.called(step), operands, letters, names, whole=names[rank - count :])


def complex_pairs(proof: Proof, step: Step) -> Claim:
    """``"... 2 -> ..."`` and back: real and imaginary parts stay together."""
    claim = require_reduced(proof.claim(step.args["self"]))
    term = proof.called(step)
    if step.name == "aten.view_as_complex":
        return along(proof, claim, [len(claim.dims) - 1], term)
    return result_from_one(proof.terms, term, (*claim.dims, ((Size(2), None),)), claim)
