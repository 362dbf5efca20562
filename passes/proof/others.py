"""Ops index by index, reductions, look-ups and norms, and ops that need whole values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from passes.axes import Size, product
from passes.proof.claims import Claim, Unproved, counted_once, is_whole
from passes.proof.dense import dims_of
from passes.proof.products import added, attention
from passes.proof.steps import Proof, Step, axis, wholly
from passes.proof.terms import ONE, Coefficient, plain

__all__ = ["arithmetic", "complex_pairs", "embedding", "general", "getitem", "index", "norm", "pointwise", "random",
           "reduced", "scan", "shifted", "sliced", "summed"]  # fmt: skip

aten = torch.ops.aten


def general(proof: Proof, step: Step) -> Claim:
    """An op of whole values: every rank computes all of it."""
    operands = proof.tensors(step.args)
    for claim in operands:
        if not proof.settled(claim, "an operand").whole:
            raise Unproved(
                f"whole operands, as nothing is known of {step.name} on parts", f"one that is {claim}",
                "each rank would compute something else of its own part",
            )  # fmt: skip
    return proof.of_wholes(proof.called(step), operands)


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
    return proof.indexwise(proof.called(step), operands)


def random(proof: Proof, step: Step) -> Claim:
    """Random numbers: alike on whole values, each rank's own on what no two ranks hold."""
    if step.name == "aten.scaled_dot_product_attention":
        return attention(proof, step)
    operands = [proof.drawn_from(step, c) for c in proof.tensors(step.args)]
    term = proof.drawn((step.name, proof.named(step.args)))
    return proof.drawn_from(step, proof.indexwise(term, operands) if operands else proof.of_wholes(term, operands))


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
        return proof.indexwise(known, [claim])
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


def along(proof: Proof, claim: Claim, dims: Sequence[int], term: int) -> Claim:
    """An op that mixes some dims, which must be whole, and leaves the others in their places."""
    if any(not is_whole(claim.dims[d]) for d in dims):
        raise Unproved(
            "the dims that the op mixes to be whole", str(claim), "each rank would mix its own part only"
        )  # fmt: skip
    shape = proof.terms.shapes[term]
    if len(shape) == len(claim.dims):
        new = wholly(shape)
        return proof.of_one(term, [new[d] if d in dims else dim for d, dim in enumerate(claim.dims)], claim)
    result = [dim for d, dim in enumerate(claim.dims) if d not in dims]
    if len(result) != len(shape):
        raise Unproved("a result of known dims", "another", "what ranks hold of it is not known")
    return proof.of_one(term, result, claim)


def _mixing(proof: Proof, step: Step, dims: Sequence[int]) -> Claim:
    """An op of one tensor that mixes some of its dims; of several, one of whole values."""
    operands = proof.tensors(step.args)
    if len(operands) != 1:
        return general(proof, step)
    return along(proof, proof.settled(operands[0]), dims, proof.called(step))


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


def complex_pairs(proof: Proof, step: Step) -> Claim:
    """``"... 2 -> ..."`` and back: real and imaginary parts stay together."""
    claim = proof.settled(proof.claim(step.args["self"]))
    term = proof.called(step)
    if step.name == "aten.view_as_complex":
        return along(proof, claim, [len(claim.dims) - 1], term)
    return proof.of_one(term, (*claim.dims, ((Size(2), None),)), claim)


def summed(proof: Proof, step: Step) -> Claim:
    """A sum, pending where what is summed is split; a mean of whole dims."""
    claim = proof.settled(proof.claim(step.args["self"]))
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
    proof.gradient(term, result, True, [(claim, False)])
    if counted_once(over):
        return Claim(term, result, pending=True)
    if len(over) > 1:
        raise Unproved("every index on one rank", str(claim), "the sum would count some more than once")
    return Claim(term, result, uncounted=over[0])


def embedding(proof: Proof, step: Step) -> Claim:
    """Rows of a table: of whole rows, or of some features of each."""
    weight, ids = (proof.settled(proof.claim(step.args[k])) for k in ("weight", "indices"))
    if not is_whole(weight.dims[0]) or not ids.whole:
        raise Unproved("all rows, and whole ids", f"{weight}; {ids}", "other rows would be read")
    return proof.of_one(proof.called(step), (*ids.dims, *weight.dims[1:]), weight)


def index(proof: Proof, step: Step) -> Claim:
    """``x[:, rows, columns]`` and ``index_select``: dims that are indexed are whole, and so are the indices."""
    claim, given = proof.settled(proof.claim(step.args["self"])), step.args.get("indices")
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
    return proof.of_one(term, (*claim.dims[:first], *new, *claim.dims[first + count :]), claim)


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
    return proof.combined(proof.called(step), operands, letters, letters[0], whole=("to", "from"))


def norm(proof: Proof, step: Step) -> Claim:
    """Layer and RMS norms over whole features."""
    operands = proof.tensors(step.args)
    rank, count = len(operands[0].dims), len(step.args["normalized_shape"])
    names = [f"d{i}" for i in range(rank)]
    letters = [names[rank - len(c.dims) :] for c in operands]
    return proof.combined(proof.called(step), operands, letters, names, whole=names[rank - count :])
