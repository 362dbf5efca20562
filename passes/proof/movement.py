"""Views, permutations, copies, parts and joins: what ranks hold moves with the values."""

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
    agreed,
    dim_of,
    is_whole,
    local_size,
    regrouped,
    split_of,
    wholly,
)
from passes.proof.dense import dims_of, order_of, taken
from passes.proof.elementwise import general
from passes.proof.reductions import sliced
from passes.proof.results import require_reduced, result_from_one, result_gradient
from passes.proof.steps import Proof, Step, axis
from passes.proof.terms import plain

__all__ = ["expand", "join", "narrow", "part", "permute", "take", "view"]


def view(proof: Proof, step: Step) -> list[Claim]:
    """Any view that keeps the order of elements, by the shape that each rank gives its part."""
    source = next(iter(step.args.values()))
    claim = proof.claim(source)
    locals_ = [_viewed(proof, step, claim, r) for r in range(proof.tp)]
    found = []
    for shape in dict.fromkeys(_shapes(proof, step, claim, locals_)):
        dims = regrouped(claim.dims, shape)
        if dims is None or len(dims) != len(locals_[0]):
            continue
        if all(
            want is None or want == local_size(dim, r)
            for r, each in enumerate(locals_)
            for want, dim in zip(each, dims, strict=True)
        ):
            term = proof.terms.viewed(claim.term, shape)
            found.append(Claim(term, dims, claim.grad, claim.pending, claim.uncounted))
    known = proof.terms.placed["call", claim.term].get((step.name, proof.named(step.args))) if claim.whole else None
    if known is not None:  # whole values, and sizes that are the same in other words
        shape = proof.terms.shapes[known]
        found.append(Claim(known, wholly(shape), claim.grad))
    if found:
        return found
    raise Unproved(
        "a view of each rank's part that is a part of a view of the whole",
        f"sizes {[' x '.join(str(n) for n in each) for each in locals_]} of what is {claim}",
        "elements would be taken for others",
    )


def _viewed(proof: Proof, step: Step, claim: Claim, rank: int) -> list[Size | None]:
    """The sizes that a rank's view has; None for one that is left open."""
    local, args = list(claim.local(rank)), {k: proof.at(v, rank) for k, v in list(step.args.items())[1:]}
    values = list(args.values())
    name = step.name.removeprefix("aten.")
    if name in ("reshape", "view", "_unsafe_view"):
        return [_size(n) for n in values[0]]
    if name == "flatten":
        start, end = axis(args.get("start_dim", 0), len(local)), axis(args.get("end_dim", -1), len(local))
        return [*local[:start], product(local[start : end + 1]), *local[end + 1 :]]
    if name == "unsqueeze":
        dim = axis(values[0], len(local) + 1)
        return [*local[:dim], Size(1), *local[dim:]]
    if name == "squeeze":
        dims = dims_of(values[0], len(local)) if values and values[0] != () else range(0 if values else len(local))
        return [n for d, n in enumerate(local) if d not in dims or not n.is_one]
    dim = axis(values[0], len(local))
    return [*local[:dim], *(_size(n) for n in values[1]), *local[dim + 1 :]]


def _size(value: Any) -> Size | None:
    if isinstance(value, Size):
        return value
    return None if value == -1 else Size(value)


def _shapes(
    proof: Proof, step: Step, claim: Claim, locals_: Sequence[Sequence[Size | None]]
) -> Iterator[tuple[Size, ...]]:
    """The global shapes that a view may have: those of the dense model, and what the parts' sizes say."""
    rank = len(locals_[0])
    yield from (s for s in proof.terms.shapes_of(claim.term) if len(s) == rank)
    was = [product(size for size, _ in dim) for dim in claim.dims]
    name, args = step.name.removeprefix("aten."), list(step.args.values())[1:]
    if name == "flatten":
        start, end = axis(step.args.get("start_dim", 0), len(was)), axis(step.args.get("end_dim", -1), len(was))
        yield (*was[:start], product(was[start : end + 1]), *was[end + 1 :])
    elif name == "unsqueeze":
        dim = axis(args[0], len(was) + 1)
        yield (*was[:dim], Size(1), *was[dim:])
    elif name == "squeeze":
        dims = dims_of(args[0], len(was)) if args and args[0] != [] else range(0 if args else len(was))
        yield tuple(n for d, n in enumerate(was) if d not in dims or not n.is_one)
    elif name == "unflatten":  # a conversion of its own: one of the pieces is what is split
        dim = axis(args[0], len(was))
        yield (*was[:dim], *(size for size, _ in claim.dims[dim]), *was[dim + 1 :])
        pieces = list(zip(*([each[dim : dim + len(args[1])] for each in locals_]), strict=True))
        for open_at in range(len(pieces)):
            rest = [each[0] for i, each in enumerate(pieces) if i != open_at]
            if any(n is None for n in rest) or any(
                set(each) != {each[0]} for i, each in enumerate(pieces) if i != open_at
            ):
                continue
            whole = was[dim].over(product(n for n in rest if n is not None))
            if whole is not None:
                sizes = [n for n in rest if n is not None]
                yield (*was[:dim], *sizes[:open_at], whole, *sizes[open_at:], *was[dim + 1 :])


def permute(proof: Proof, step: Step) -> Claim:
    """Dims in another order."""
    source, *rest = step.args.values()
    claim = proof.claim(source)
    order = order_of(step.target, len(claim.dims), [proof.same(x) for x in rest])
    term = claim.term
    if order != tuple(range(len(order))):
        term = proof.known(("permute", claim.term, order), "a permutation")
    return Claim(term, tuple(claim.dims[d] for d in order), claim.grad, claim.pending, claim.uncounted)


def expand(proof: Proof, step: Step) -> list[Claim]:
    """Copies along dims of size one: whichever of them a rank holds, they are alike."""
    claim = require_reduced(proof.claim(step.args["self"]))
    sizes = [[_size(n) for n in proof.at(step.args["size"], r)] for r in range(proof.tp)]
    base, found = proof.terms.shapes[claim.term], []
    for shape, term in [*proof.terms.placed["expand", claim.term].items(), (base, claim.term)]:
        held = _expanded(claim, shape, sizes)
        if held is not None:
            dims, carries = held
            if carries:
                grad = result_gradient(proof.terms, term, (), False, [(claim, True)])
            else:
                grad = _parts(proof, term, claim)
            found.append(Claim(term, dims, grad))
    if found:
        return found
    raise Unproved("copies that the dense model makes", "others", "values would be read in other places")


def _parts(proof: Proof, term: int, claim: Claim) -> str | None:
    """The gradient of copies of which each rank holds some: in parts, and so must the source's be."""
    if not proof.terms.grads[term]:
        return None
    if claim.grad not in ("partial", "both"):
        raise Unproved(
            "a value whose gradient is in parts", f"one that is {claim}", "it would miss other ranks' copies"
        )
    return "partial"


def _expanded(claim: Claim, shape: Any, sizes: Sequence[Sequence[Size | None]]) -> tuple[tuple[Dim, ...], bool] | None:
    if not isinstance(shape, tuple) or len(shape) != len(sizes[0]):
        return None
    new, dims, carries = len(shape) - len(claim.dims), [], True
    for d, whole in enumerate(shape):
        dim = claim.dims[d - new] if d >= new else ()
        asked = [each[d] for each in sizes]
        if dim or whole.is_one:
            if any(n is not None and n != local_size(dim, r) for r, n in enumerate(asked)):
                return None
            dims.append(dim)
        elif all(n == whole for n in asked):
            dims.append(((whole, None),))
        else:
            if not whole.static or any(n is None or not n.static or n.number > whole.number for n in asked):
                return None
            held = [np.arange(n.number) for n in asked if n is not None]
            dims.append(((whole, split_of(whole.number, held, np.zeros(whole.number, dtype=np.int64))),))
            carries = False
    return tuple(dims), carries


def _held(dim: Dim, rank: int) -> tuple[int, np.ndarray] | None:
    """A static dim's size and the indices that a rank holds, in its order; None for a symbolic one."""
    if not dim:
        return 1, np.arange(1)
    if len(dim) != 1 or not dim[0][0].static:
        return None
    size, split = dim[0]
    return size.number, np.arange(size.number) if split is None else split.ranks[rank]


def _static(dim: Dim, rank: int) -> tuple[int, np.ndarray]:
    """A dim's size and the indices that a rank holds, in its order."""
    held = _held(dim, rank)
    if held is None:
        raise Unproved("a static dim", "a symbolic one", "what a rank holds of it is not known")
    return held


def part(proof: Proof, step: Step) -> Claim | list[Claim]:
    """A slice or one index of a dim: of what each rank holds, it takes what the dense model takes of the whole."""
    source, *_ = step.args.values()
    claim = require_reduced(proof.claim(source))
    dim = step.args.get("dim", 0) if step.name != "aten.flip" else step.args["dims"]
    if isinstance(dim, (list, tuple)):
        if len(dim) != 1:
            return sliced(proof, step)
        (dim,) = dim
    dim = axis(dim, len(claim.dims))
    places = []
    for rank in range(proof.tp):
        held = _held(claim.dims[dim], rank)
        args = {k: plain(proof.at(v, rank)) for k, v in list(step.args.items())[1:]}
        what = None if held is None else taken(step.name, args, len(held[1]))
        if held is None or what is None:
            return sliced(proof, step)
        places.append(np.array(what, dtype=np.int64))
    return _picked(proof, claim, dim, places, step.name == "aten.select")


def _picked(proof: Proof, claim: Claim, dim: int, places: Sequence[np.ndarray], removed: bool) -> list[Claim]:
    """The parts of a term that ranks have who take, each at its own places, of what they hold."""
    candidates: list[tuple[Any, int]] = list(proof.terms.placed["part", claim.term].items())
    if not removed:
        size = product(n for n, _ in claim.dims[dim]).number
        candidates.append(((dim, range(size), False), claim.term))
    lists, found = tuple(p.tobytes() for p in places), []
    for (at, what, gone), term in candidates:
        match = _match(claim.dims[dim], lists, what) if at == dim and gone == removed else None
        if match is None or ((removed or len(what) == 1) and any(len(p) != 1 for p in places)):
            continue
        exact, split = match
        new: tuple[Dim, ...] = () if removed else (((Size(len(what)), split),) if len(what) != 1 else (),)
        dims = (*claim.dims[:dim], *new, *claim.dims[dim + 1 :])
        if exact or removed:
            found.append(result_from_one(proof.terms, term, dims, claim))
        elif term != claim.term and not (proof.terms.grads[term] and claim.grad == "complete"):
            found.append(result_from_one(proof.terms, term, dims, claim, carries=False))
    if found:
        return found
    raise Unproved(
        "the part that the dense model takes",
        f"places {[_short(p) for p in places]} of what is {Claim(0, (claim.dims[dim],))}",
        "values would be read at other places",
    )


@lru_cache(maxsize=4096)
def _match(dim: Dim, places: tuple[bytes, ...], what: range) -> tuple[bool, Split | None] | None:
    """Where in a part the ranks' elements are, if all are there, and whether each takes all it holds of it, once."""
    inside, exact, found = np.asarray(what), True, []
    for rank, each in enumerate(places):
        mine, held = np.frombuffer(each, dtype=np.int64), _held(dim, rank)
        if held is None or not np.isin(held[1][mine], inside).all():
            return None
        exact = exact and len(np.unique(mine)) == len(mine) == int(np.isin(held[1], inside).sum())
        found.append((held[1][mine] - what.start) // what.step)
    return exact, split_of(len(what), found)


def _short(picks: np.ndarray) -> str:
    return str(Split(int(picks.max(initial=0)) + 1, (picks,))) if len(picks) else "none"


def narrow(proof: Proof, step: Step) -> Claim:
    """A rank's own indices of a value that it has more of."""
    source, dim, runs = list(step.args.values())[:3]
    claim = require_reduced(proof.claim(source))
    dim = axis(dim, len(claim.dims))
    lists, size = [], 0
    for rank in range(proof.tp):
        size, held = _static(claim.dims[dim], rank)
        lists.append(_of(held, np.concatenate([np.arange(a, b) for a, b in proof.at(runs, rank)])))
    dims = (*claim.dims[:dim], ((Size(size), split_of(size, lists)),), *claim.dims[dim + 1 :])
    return result_from_one(proof.terms, claim.term, dims, claim, carries=False)


def take(proof: Proof, step: Step) -> list[Claim]:
    """Local positions in any order, for what the dense model takes."""
    source, dim, positions = list(step.args.values())[:3]
    claim = require_reduced(proof.claim(source))
    dim = axis(dim, len(claim.dims))
    places = [np.array(proof.at(positions, r), dtype=np.int64) for r in range(proof.tp)]
    for rank, mine in enumerate(places):
        _of(_static(claim.dims[dim], rank)[1], mine)
    return _picked(proof, claim, dim, places, False)


def _of(held: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What a rank holds at its own places."""
    if places.size and not 0 <= places.min() <= places.max() < len(held):
        raise Unproved("places that the rank has", f"others than 0 to {len(held) - 1}", "the program would fail")
    return held[places]


def join(proof: Proof, step: Step) -> Claim:
    """Parts one behind the other; each rank joins what it holds of each."""
    parts = [require_reduced(proof.claim(n)) for n in step.args["tensors"]]
    term = proof.known((step.name, proof.named(step.args)), "a join")
    rank = len(proof.terms.shapes[term])
    if any(len(c.dims) != rank for c in parts):
        return general(proof, step)
    dim = axis(step.args.get("dim", 0), rank)
    dims = list(parts[0].dims)
    for claim in parts[1:]:
        for d in range(rank):
            both = agreed(dims[d], claim.dims[d]) if d != dim else dims[d]
            if both is None:
                raise Unproved("parts that hold the same of the other dims", str(claim), "rows would be mixed up")
            dims[d] = both
    if all(is_whole(c.dims[dim]) for c in parts):
        dims[dim] = wholly(proof.terms.shapes[term])[dim]
    else:
        lists = []
        for r in range(proof.tp):
            start, found = 0, []
            for claim in parts:
                size, held = _static(claim.dims[dim], r)
                found.append(held + start)
                start += size
            lists.append(np.concatenate(found))
        dims[dim] = dim_of([(Size(start), split_of(start, lists))])
    grad = result_gradient(proof.terms, term, dims, False, [(c, True) for c in parts])
    return Claim(term, tuple(dims)).with_grad(grad)
