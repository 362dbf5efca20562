"""results: the claim of an op's result, from the claims of its operands."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from passes.proof.claims import Claim, Dim, Unproved, common_dim, is_disjoint, is_unsplit, unsplit_dims
from passes.proof.terms import Terms

__all__ = [
    "align_dims",
    "combine",
    "combine_indexwise",
    "operand_carriers",
    "require_reduced",
    "require_replicated",
    "result_from_one",
    "result_from_replicated",
    "result_gradient",
]


def require_reduced(claim: Claim, what: str = "a value") -> Claim:
    """The claim, which must not be one of a partial sum."""
    if claim.pending or claim.unweighted is not None:
        raise Unproved(
            f"{what} that is reduced", "a partial sum", "each rank would use its own partial sum as the value"
        )
    return claim


def require_replicated(claim: Claim) -> Claim:
    """The claim, which must be one of a replicated value."""
    if not require_reduced(claim).replicated:
        raise Unproved("a replicated value", f"one that is {claim}", "each rank would compute on its own shard only")
    return claim


def align_dims(operands: Sequence[Claim], letters: Sequence[Sequence[str]]) -> dict[str, Dim]:
    """The dim that each letter stands for; operands that share a letter must hold the same indices of it."""
    dims: dict[str, Dim] = {}
    for claim, names in zip(operands, letters, strict=True):
        require_reduced(claim, "an operand")
        for letter, dim in zip(names, claim.dims, strict=True):
            if not dim:
                dims.setdefault(letter, ())
                continue
            before = dims.get(letter) or dim
            common = common_dim(before, dim)
            if common is None:
                raise Unproved(
                    f"the same indices of a dim on every operand ({Claim(0, (before,))})",
                    f"{Claim(0, (dim,))}",
                    "elements of different indices would be combined",
                )
            dims[letter] = common
    return dims


def result_gradient(
    terms: Terms, term: int, dims: Sequence[Dim], pending: bool, operands: Sequence[tuple[Claim, bool]]
) -> str | None:
    """The kind of gradient that arrives at a result, from the kinds that its operands need.

    Args:
        terms: all terms.
        term: the result's term.
        dims: the result's dims.
        pending: whether the result is a partial sum.
        operands: each with whether it is split in every dim in which the result is. A rank that holds an element of
            such an operand holds all results that are computed from it.
    """
    if not terms.grads[term]:
        return None
    flowing = [(c, carries) for c, carries in operands if c.grad is not None]
    if not flowing:
        raise Unproved("a value that gradients flow through", "none", "gradients would stop here")
    partial = [c.grad in ("partial", "both") for c, _ in flowing]
    if pending:
        _require_entered(flowing, partial)
        return None
    splits = tuple(split for dim in dims for _, split in dim if split is not None)
    if splits and is_disjoint(splits):
        _require_entered(flowing, [p or carries for p, (_, carries) in zip(partial, flowing, strict=True)])
        return "both"
    if all(partial):
        return "partial"
    _require_entered(flowing, [carries and c.grad in ("complete", "both") for c, carries in flowing])
    return "complete"


def _require_entered(flowing: Sequence[tuple[Claim, bool]], fits: Sequence[bool]) -> None:
    """Raise if the gradient of an operand is not of the kind that the result needs."""
    for (claim, _), ok in zip(flowing, fits, strict=True):
        if not ok:
            raise Unproved(
                "operands whose gradients are all complete or all partial sums, as the result needs",
                f"one that is {claim}",
                "its gradient would lack the other ranks' contributions, or count them more than once",
            )


def combine(
    terms: Terms, term: int, operands: Sequence[Claim], letters: Sequence[Sequence[str]], out: Sequence[str],
    unsplit: Collection[str] = (),
) -> Claim:  # fmt: skip
    """The claim of a result that is computed index by index, along the letters of its dims.

    Args:
        terms: all terms.
        term: the result's term.
        operands: the claims of the operands.
        letters: per operand, a letter for each dim.
        out: the result's letters.
        unsplit: the letters of dims that must not be split.
    """
    dims = align_dims(operands, letters)
    for letter in unsplit:
        if not is_unsplit(dims.get(letter, ())):
            raise Unproved(
                "the dims that the op mixes to be unsplit", str(Claim(0, (dims[letter],))),
                "each rank would mix its own shard only",
            )  # fmt: skip
    result = tuple(dims.get(x, ()) for x in out)
    grad = result_gradient(terms, term, result, False, operand_carriers(operands, letters, out, result))
    return Claim(term, result).with_grad(grad)


def operand_carriers(
    operands: Sequence[Claim], letters: Sequence[Sequence[str]], out: Sequence[str], result: Sequence[Dim]
) -> list[tuple[Claim, bool]]:
    """Each operand with whether it is split in every dim in which the result is."""
    across = {x for x, dim in zip(out, result, strict=True) if not is_unsplit(dim)}
    return [
        (c, across <= {x for x, dim in zip(names, c.dims, strict=True) if dim})
        for c, names in zip(operands, letters, strict=True)
    ]


def combine_indexwise(terms: Terms, term: int, operands: Sequence[Claim]) -> Claim:
    """The claim of a result whose operands broadcast."""
    rank = len(terms.shapes[term])
    names = [f"d{i}" for i in range(rank)]
    return combine(terms, term, operands, [names[rank - len(c.dims) :] for c in operands], names)


def result_from_replicated(terms: Terms, term: int, operands: Sequence[Claim]) -> Claim:
    """The claim of a result that every rank computes from replicated operands."""
    dims = unsplit_dims(terms.shapes[term])
    return Claim(term, dims, result_gradient(terms, term, dims, False, [(c, True) for c in operands]))


def result_from_one(terms: Terms, term: int, dims: Sequence[Dim], claim: Claim, carries: bool = True) -> Claim:
    """The claim of a result that is computed from one operand."""
    return Claim(term, tuple(dims)).with_grad(result_gradient(terms, term, dims, False, [(claim, carries)]))
