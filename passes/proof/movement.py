"""movement: proof rules for views, permutations, expansions, slices, windows, concatenations, which move elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from passes.layouts.axes import Size, product
from passes.proof.claims import (
    Claim,
    Dim,
    Split,
    Unproved,
    common_dim,
    dim_of,
    is_unsplit,
    local_size,
    regroup,
    split_of,
    unsplit_dims,
)
from passes.proof.dense import dims_of, permutation, taken_indices
from passes.proof.elementwise import replicated_op
from passes.proof.reductions import dynamic_slice
from passes.proof.results import require_reduced, result_from_one, result_gradient
from passes.proof.steps import Proof, Step, normalize_dim
from passes.proof.terms import static_int

__all__ = ["cat", "expand", "narrow", "permute", "slice_or_select", "take", "unfold", "view"]


def view(proof: Proof, step: Step) -> list[Claim]:
    """Any view that keeps the order of elements, identified by the shape of each rank's view."""
    source = next(iter(step.args.values()))
    claim = proof.claim(source)
    local_shapes = [_view_sizes(proof, step, claim, r) for r in range(proof.tp)]
    claims = []
    for shape in dict.fromkeys(_global_shapes(proof, step, claim, local_shapes)):
        dims = regroup(claim.dims, shape)
        if dims is None or len(dims) != len(local_shapes[0]):
            continue
        if all(
            size is None or size == local_size(dim, r)
            for r, sizes in enumerate(local_shapes)
            for size, dim in zip(sizes, dims, strict=True)
        ):
            term = proof.terms.passing_view(claim.term, shape)
            claims.append(Claim(term, dims, claim.grad, claim.pending, claim.unweighted))
    known = (
        proof.terms.variants["call", claim.term].get((step.name, proof.arguments_key(step.args)))
        if claim.replicated
        else None
    )
    if known is not None:  # replicated values, with the dense model's own call
        shape = proof.terms.shapes[known]
        claims.append(Claim(known, unsplit_dims(shape), claim.grad))
    if claims:
        return claims
    raise Unproved(
        "a view of each rank's shard that is a shard of a view of the full value",
        f"sizes {[' x '.join(str(n) for n in sizes) for sizes in local_shapes]} of a value that is {claim}",
        "elements would be taken for others",
    )


def _view_sizes(proof: Proof, step: Step, claim: Claim, rank: int) -> list[Size | None]:
    """The sizes of a rank's view; None for one that is given as -1."""
    local, args = list(claim.local(rank)), {k: proof.on_rank(v, rank) for k, v in list(step.args.items())[1:]}
    values = list(args.values())
    name = step.name.removeprefix("aten.")
    if name in ("reshape", "view", "_unsafe_view"):
        return [_size(n) for n in values[0]]
    if name == "flatten":
        start, end = (
            normalize_dim(args.get("start_dim", 0), len(local)),
            normalize_dim(args.get("end_dim", -1), len(local)),
        )
        return [*local[:start], product(local[start : end + 1]), *local[end + 1 :]]
    if name == "unsqueeze":
        dim = normalize_dim(values[0], len(local) + 1)
        return [*local[:dim], Size(1), *local[dim:]]
    if name == "squeeze":
        dims = dims_of(values[0], len(local)) if values and values[0] != () else range(0 if values else len(local))
        return [n for d, n in enumerate(local) if d not in dims or not n.is_one]
    dim = normalize_dim(values[0], len(local))
    return [*local[:dim], *(_size(n) for n in values[1]), *local[dim + 1 :]]


def _size(value: Any) -> Size | None:
    """A size of a view; None for -1."""
    if isinstance(value, Size):
        return value
    return None if value == -1 else Size(value)


def _global_shapes(
    proof: Proof, step: Step, claim: Claim, local_shapes: Sequence[Sequence[Size | None]]
) -> Iterator[tuple[Size, ...]]:
    """The global shapes that a view may have: those of the dense model, and those that the ranks' sizes allow."""
    rank = len(local_shapes[0])
    yield from (s for s in proof.terms.shapes_of(claim.term) if len(s) == rank)
    before = [product(size for size, _ in dim) for dim in claim.dims]
    name, args = step.name.removeprefix("aten."), list(step.args.values())[1:]
    if name == "flatten":
        start, end = (
            normalize_dim(step.args.get("start_dim", 0), len(before)),
            normalize_dim(step.args.get("end_dim", -1), len(before)),
        )
        yield (*before[:start], product(before[start : end + 1]), *before[end + 1 :])
    elif name == "unsqueeze":
        dim = normalize_dim(args[0], len(before) + 1)
        yield (*before[:dim], Size(1), *before[dim:])
    elif name == "squeeze":
        dims = dims_of(args[0], len(before)) if args and args[0] != [] else range(0 if args else len(before))
        yield tuple(n for d, n in enumerate(before) if d not in dims or not n.is_one)
    elif name == "unflatten":  # the rewritten graph may unflatten where the dense one does not: one piece is split
        dim = normalize_dim(args[0], len(before))
        yield (*before[:dim], *(size for size, _ in claim.dims[dim]), *before[dim + 1 :])
        pieces = list(zip(*([sizes[dim : dim + len(args[1])] for sizes in local_shapes]), strict=True))
        for position in range(len(pieces)):
            rest = [sizes[0] for i, sizes in enumerate(pieces) if i != position]
            if any(n is None for n in rest) or any(
                set(sizes) != {sizes[0]} for i, sizes in enumerate(pieces) if i != position
            ):
                continue
            full = before[dim].over(product(n for n in rest if n is not None))
            if full is not None:
                sizes = [n for n in rest if n is not None]
                yield (*before[:dim], *sizes[:position], full, *sizes[position:], *before[dim + 1 :])


def permute(proof: Proof, step: Step) -> Claim:
    """Dims in another order."""
    source, *rest = step.args.values()
    claim = proof.claim(source)
    order = permutation(step.target, len(claim.dims), [proof.uniform(x) for x in rest])
    term = claim.term
    if order != tuple(range(len(order))):
        term = proof.find_term(("permute", claim.term, order), "a permutation")
    return Claim(term, tuple(claim.dims[d] for d in order), claim.grad, claim.pending, claim.unweighted)


def expand(proof: Proof, step: Step) -> list[Claim]:
    """Copies along dims of size one, which are equal, so that a rank may hold any of them."""
    claim = require_reduced(proof.claim(step.args["self"]))
    sizes = [[_size(n) for n in proof.on_rank(step.args["size"], r)] for r in range(proof.tp)]
    base, claims = proof.terms.shapes[claim.term], []
    for shape, term in [*proof.terms.variants["expand", claim.term].items(), (base, claim.term)]:
        expanded = _expand_dims(claim, shape, sizes)
        if expanded is not None:
            dims, carries = expanded
            if carries:
                grad = result_gradient(proof.terms, term, (), False, [(claim, True)])
            else:
                grad = _copies_gradient(proof, term, claim)
            claims.append(Claim(term, dims, grad))
    if claims:
        return claims
    raise Unproved("copies that the dense model makes", "others", "values would be read at other indices")


def _copies_gradient(proof: Proof, term: int, claim: Claim) -> str | None:
    """The kind of gradient of copies of which each rank holds some: a partial sum, as the source's must be."""
    if not proof.terms.grads[term]:
        return None
    if claim.grad not in ("partial", "both"):
        raise Unproved(
            "a value whose gradient is a partial sum", f"one that is {claim}", "it would lack other ranks' copies"
        )
    return "partial"


def _expand_dims(
    claim: Claim, shape: Any, sizes: Sequence[Sequence[Size | None]]
) -> tuple[tuple[Dim, ...], bool] | None:
    """An expansion's dims, and whether no copies are split; None if the ranks' sizes do not fit the shape."""
    if not isinstance(shape, tuple) or len(shape) != len(sizes[0]):
        return None
    new, dims, carries = len(shape) - len(claim.dims), [], True
    for d, full in enumerate(shape):
        dim = claim.dims[d - new] if d >= new else ()
        column = [rank_sizes[d] for rank_sizes in sizes]
        if dim or full.is_one:
            if any(n is not None and n != local_size(dim, r) for r, n in enumerate(column)):
                return None
            dims.append(dim)
        elif all(n == full for n in column):
            dims.append(((full, None),))
        else:
            if not full.static or any(n is None or not n.static or n.number > full.number for n in column):
                return None
            indices = [np.arange(n.number) for n in column if n is not None]
            dims.append(((full, split_of(full.number, indices, np.zeros(full.number, dtype=np.int64))),))
            carries = False
    return tuple(dims), carries


def _local_indices(dim: Dim, rank: int) -> tuple[int, np.ndarray] | None:
    """A static dim's size, and the indices that a rank holds, in its order; None for a symbolic dim."""
    if not dim:
        return 1, np.arange(1)
    if len(dim) != 1 or not dim[0][0].static:
        return None
    size, split = dim[0]
    return size.number, np.arange(size.number) if split is None else split.ranks[rank]


def _static_indices(dim: Dim, rank: int) -> tuple[int, np.ndarray]:
    """A dim's size, and the indices that a rank holds, in its order; the dim must be static."""
    indices = _local_indices(dim, rank)
    if indices is None:
        raise Unproved("a static dim", "a symbolic one", "the rank's indices are not known")
    return indices


def slice_or_select(proof: Proof, step: Step) -> Claim | list[Claim]:
    """A slice of a dim, or one index of it: each rank takes those of its indices that the dense model takes."""
    source, *_ = step.args.values()
    claim = require_reduced(proof.claim(source))
    dim = step.args.get("dim", 0) if step.name != "aten.flip" else step.args["dims"]
    if isinstance(dim, (list, tuple)):
        if len(dim) != 1:
            return dynamic_slice(proof, step)
        (dim,) = dim
    dim = normalize_dim(dim, len(claim.dims))
    positions = []
    for rank in range(proof.tp):
        local = _local_indices(claim.dims[dim], rank)
        args = {k: static_int(proof.on_rank(v, rank)) for k, v in list(step.args.items())[1:]}
        indices = None if local is None else taken_indices(step.name, args, len(local[1]))
        if local is None or indices is None:
            return dynamic_slice(proof, step)
        positions.append(np.array(indices, dtype=np.int64))
    return _select_slices(proof, claim, dim, positions, step.name == "aten.select")


def _select_slices(proof: Proof, claim: Claim, dim: int, positions: Sequence[np.ndarray], removed: bool) -> list[Claim]:
    """The claims of slices of a term: each rank takes its own positions of the indices that it holds.

    Args:
        proof: the proof.
        claim: the claim of the value that is sliced.
        dim: the dim that is sliced.
        positions: per rank, positions among its own indices of the dim.
        removed: whether the dim is removed, as ``select`` does.
    """
    candidates: list[tuple[Any, int]] = list(proof.terms.variants["part", claim.term].items())
    if not removed:
        size = product(n for n, _ in claim.dims[dim]).number
        candidates.append(((dim, range(size), False), claim.term))
    lists, claims = tuple(p.tobytes() for p in positions), []
    for (dense_dim, indices, dense_removed), term in candidates:
        fits = dense_dim == dim and dense_removed == removed
        match = _match(claim.dims[dim], lists, indices) if fits else None
        if match is None or ((removed or len(indices) == 1) and any(len(p) != 1 for p in positions)):
            continue
        exact, split = match
        new: tuple[Dim, ...] = () if removed else (((Size(len(indices)), split),) if len(indices) != 1 else (),)
        dims = (*claim.dims[:dim], *new, *claim.dims[dim + 1 :])
        if exact or removed:
            claims.append(result_from_one(proof.terms, term, dims, claim))
        elif term != claim.term and not (proof.terms.grads[term] and claim.grad == "complete"):
            claims.append(result_from_one(proof.terms, term, dims, claim, carries=False))
    if claims:
        return claims
    raise Unproved(
        "the slice that the dense model takes",
        f"positions {[_index_text(p) for p in positions]} of a dim that is {Claim(0, (claim.dims[dim],))}",
        "values would be read at other indices",
    )


@lru_cache(maxsize=4096)
def _match(dim: Dim, positions: tuple[bytes, ...], indices: range) -> tuple[bool, Split | None] | None:
    """How the ranks' elements lie in a slice.

    Args:
        dim: the dim that is sliced.
        positions: per rank, positions among its own indices of the dim, as bytes.
        indices: the indices that the slice takes.

    Returns:
        Whether each rank takes every index that it holds of the slice once, and the split of the slice's dim; None if
        a rank takes an index outside of the slice.
    """
    taken, exact, lists = np.asarray(indices), True, []
    for rank, text in enumerate(positions):
        mine, local = np.frombuffer(text, dtype=np.int64), _local_indices(dim, rank)
        if local is None or not np.isin(local[1][mine], taken).all():
            return None
        exact = exact and len(np.unique(mine)) == len(mine) == int(np.isin(local[1], taken).sum())
        lists.append((local[1][mine] - indices.start) // indices.step)
    return exact, split_of(len(indices), lists)


def _index_text(positions: np.ndarray) -> str:
    """Positions as text, for an error."""
    return str(Split(int(positions.max(initial=0)) + 1, (positions,))) if len(positions) else "none"


def narrow(proof: Proof, step: Step) -> Claim:
    """The shard of a value that a rank holds more of."""
    source, dim, runs = list(step.args.values())[:3]
    claim = require_reduced(proof.claim(source))
    dim = normalize_dim(dim, len(claim.dims))
    lists, size = [], 0
    for rank in range(proof.tp):
        size, local = _static_indices(claim.dims[dim], rank)
        lists.append(_indices_at(local, np.concatenate([np.arange(a, b) for a, b in proof.on_rank(runs, rank)])))
    dims = (*claim.dims[:dim], ((Size(size), split_of(size, lists)),), *claim.dims[dim + 1 :])
    return result_from_one(proof.terms, claim.term, dims, claim, carries=False)


def take(proof: Proof, step: Step) -> list[Claim]:
    """Elements at local positions, in any order, that stand for a slice of the dense model."""
    source, dim, positions = list(step.args.values())[:3]
    claim = require_reduced(proof.claim(source))
    dim = normalize_dim(dim, len(claim.dims))
    lists = [np.array(proof.on_rank(positions, r), dtype=np.int64) for r in range(proof.tp)]
    for rank, mine in enumerate(lists):
        _indices_at(_static_indices(claim.dims[dim], rank)[1], mine)
    return _select_slices(proof, claim, dim, lists, False)


def _indices_at(local: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The indices that a rank holds at these positions."""
    if positions.size and not 0 <= positions.min() <= positions.max() < len(local):
        raise Unproved("positions that the rank has", f"others than 0 to {len(local) - 1}", "the program would fail")
    return local[positions]


def unfold(proof: Proof, step: Step) -> Claim:
    """Windows of one dim, which must be unsplit; the elements of a window are a new last dim."""
    claim, term = require_reduced(proof.claim(step.args["self"])), proof.call_term(step)
    if not claim.dims:
        return replicated_op(proof, step)
    dim = normalize_dim(step.args["dimension"], len(claim.dims))
    if not is_unsplit(claim.dims[dim]):
        raise Unproved("the dim of the windows to be unsplit", str(claim), "windows over two shards would be lost")
    new = unsplit_dims(proof.terms.shapes[term])
    return result_from_one(proof.terms, term, (*claim.dims[:dim], new[dim], *claim.dims[dim + 1 :], new[-1]), claim)


def cat(proof: Proof, step: Step) -> Claim:
    """A concatenation, in which each rank concatenates its shards."""
    parts = [require_reduced(proof.claim(n)) for n in step.args["tensors"]]
    term = proof.find_term((step.name, proof.arguments_key(step.args)), "a concatenation")
    rank = len(proof.terms.shapes[term])
    if any(len(c.dims) != rank for c in parts):
        return replicated_op(proof, step)
    dim = normalize_dim(step.args.get("dim", 0), rank)
    dims = list(parts[0].dims)
    for claim in parts[1:]:
        for d in range(rank):
            common = common_dim(dims[d], claim.dims[d]) if d != dim else dims[d]
            if common is None:
                raise Unproved("operands with the same indices of the other dims", str(claim), "rows would be mixed up")
            dims[d] = common
    if all(is_unsplit(c.dims[dim]) for c in parts):
        dims[dim] = unsplit_dims(proof.terms.shapes[term])[dim]
    else:
        lists = []
        for r in range(proof.tp):
            start, indices = 0, []
            for claim in parts:
                size, local = _static_indices(claim.dims[dim], r)
                indices.append(local + start)
                start += size
            lists.append(np.concatenate(indices))
        dims[dim] = dim_of([(Size(start), split_of(start, lists))])
    grad = result_gradient(proof.terms, term, dims, False, [(c, True) for c in parts])
    return Claim(term, tuple(dims)).with_grad(grad)
