"""lookups: proof rules for embeddings and indexing."""

from __future__ import annotations

from passes.proof.claims import Claim, Unproved, is_whole, wholly
from passes.proof.elementwise import general
from passes.proof.results import combine, require_reduced, result_from_one
from passes.proof.steps import Proof, Step, axis

__all__ = ["embedding", "index"]


def embedding(proof: Proof, step: Step) -> Claim:
    """Rows of a table: of whole rows, or of some features of each."""
    weight, ids = (require_reduced(proof.claim(step.args[k])) for k in ("weight", "indices"))
    if not is_whole(weight.dims[0]) or not ids.whole:
        raise Unproved("all rows, and whole ids", f"{weight}; {ids}", "other rows would be read")
    return result_from_one(proof.terms, proof.called(step), (*ids.dims, *weight.dims[1:]), weight)


def index(proof: Proof, step: Step) -> Claim:
    """``x[:, rows, columns]`` and ``index_select``: dims that are indexed are whole, and so are the indices."""
    claim, given = require_reduced(proof.claim(step.args["self"])), step.args.get("indices")
    rest = [c for k, v in step.args.items() if k != "self" for c in proof.tensors(v)]
    if claim.whole or any(not c.whole for c in rest):
        return general(proof, step)
    picked = [axis(step.args["dim"], len(claim.dims))] if given is None else []
    dims = picked or [d for d, n in enumerate(given or []) if n is not None]
    first, count = dims[0], len(dims)
    if dims != list(range(first, first + count)) or any(not is_whole(claim.dims[d]) for d in dims):
        raise Unproved("indexed dims to be whole and side by side", str(claim), "other elements would be read")
    term = proof.called(step)
    shape = proof.terms.shapes[term]
    new = wholly(shape[first : first + len(shape) - len(claim.dims) + count])
    return result_from_one(proof.terms, term, (*claim.dims[:first], *new, *claim.dims[first + count :]), claim)


def placed(proof: Proof, step: Step) -> Claim:
    """Something written over indices of one whole dim: ``x[:, :, indices] = y``, ``index_copy``, ``slice_scatter``."""
    source = next(step.args[name] for name in ("source", "values", "src") if name in step.args)
    operands, given = (proof.claim(step.args["self"]), proof.claim(source)), step.args.get("indices")
    used = [axis(step.args.get("dim", 0), len(operands[0].dims))] if given is None else []
    used = used or [d for d, n in enumerate(given or []) if n is not None]
    lacking = len(operands[0].dims) - len(operands[1].dims)
    if all(c.whole for c in operands) or len(used) != 1 or not 0 <= lacking <= used[0]:
        return general(proof, step)
    at = step.args.get("index") if given is None else given[used[0]]
    indices = proof.claim(at) if at is not None else None
    if indices is not None and (not indices.whole or len(indices.dims) > 1):
        raise Unproved("whole indices of one dim", str(indices), "other places would be written over")
    out = [f"d{i}" for i in range(len(operands[0].dims))]
    letters = [[name if i in used else x for i, x in enumerate(out)] for name in ("to", "from")]
    letters[1] = letters[1][lacking:]  # an assignment leaves out leading dims of one
    return combine(proof.terms, proof.called(step), operands, letters, letters[0], whole=("to", "from"))
