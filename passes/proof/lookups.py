"""lookups: proof rules for embeddings and indexing."""

from __future__ import annotations

from passes.proof.claims import Claim, Unproved, is_unsplit, unsplit_dims
from passes.proof.elementwise import replicated_op
from passes.proof.results import combine, require_reduced, result_from_one
from passes.proof.steps import Proof, Step, normalize_dim

__all__ = ["embedding", "index"]


def embedding(proof: Proof, step: Step) -> Claim:
    """Rows of a table that is unsplit, or split by features."""
    weight, ids = (require_reduced(proof.claim(step.args[k])) for k in ("weight", "indices"))
    if not is_unsplit(weight.dims[0]) or not ids.replicated:
        raise Unproved("a table with all rows, and replicated ids", f"{weight}; {ids}", "other rows would be read")
    return result_from_one(proof.terms, proof.call_term(step), (*ids.dims, *weight.dims[1:]), weight)


def index(proof: Proof, step: Step) -> Claim:
    """``x[:, rows, columns]`` and ``index_select``: indexed dims are unsplit, and indices are replicated."""
    claim, indices = require_reduced(proof.claim(step.args["self"])), step.args.get("indices")
    rest = [c for k, v in step.args.items() if k != "self" for c in proof.claims(v)]
    if claim.replicated or any(not c.replicated for c in rest):
        return replicated_op(proof, step)
    selected = [normalize_dim(step.args["dim"], len(claim.dims))] if indices is None else []
    dims = selected or [d for d, n in enumerate(indices or []) if n is not None]
    first, count = dims[0], len(dims)
    if dims != list(range(first, first + count)) or any(not is_unsplit(claim.dims[d]) for d in dims):
        raise Unproved("indexed dims to be unsplit and adjacent", str(claim), "other elements would be read")
    term = proof.call_term(step)
    shape = proof.terms.shapes[term]
    new = unsplit_dims(shape[first : first + len(shape) - len(claim.dims) + count])
    return result_from_one(proof.terms, term, (*claim.dims[:first], *new, *claim.dims[first + count :]), claim)


def write(proof: Proof, step: Step) -> Claim:
    """A value written to indices of one unsplit dim: ``x[:, :, indices] = y``, ``index_copy``, ``slice_scatter``."""
    source = next(step.args[name] for name in ("source", "values", "src") if name in step.args)
    operands, indices = (proof.claim(step.args["self"]), proof.claim(source)), step.args.get("indices")
    dims = [normalize_dim(step.args.get("dim", 0), len(operands[0].dims))] if indices is None else []
    dims = dims or [d for d, n in enumerate(indices or []) if n is not None]
    missing = len(operands[0].dims) - len(operands[1].dims)
    if all(c.replicated for c in operands) or len(dims) != 1 or not 0 <= missing <= dims[0]:
        return replicated_op(proof, step)
    index_node = step.args.get("index") if indices is None else indices[dims[0]]
    positions = proof.claim(index_node) if index_node is not None else None
    if positions is not None and (not positions.replicated or len(positions.dims) > 1):
        raise Unproved("replicated indices of one dim", str(positions), "other elements would be written over")
    out = [f"d{i}" for i in range(len(operands[0].dims))]
    letters = [[name if i in dims else x for i, x in enumerate(out)] for name in ("to", "from")]
    letters[1] = letters[1][missing:]  # the source may lack leading dims of size one
    return combine(proof.terms, proof.call_term(step), operands, letters, letters[0], unsplit=("to", "from"))
