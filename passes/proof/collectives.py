"""The collectives, and the ops that work across ranks: what they need of the ranks' parts, and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from passes.layouts.sharded_value import GROUP
from passes.ops.context import parse_group
from passes.proof.claims import Claim, Dim, Split, Unproved, counted_once, is_whole, wholly
from passes.proof.results import require_reduced, result_gradient
from passes.proof.steps import Proof, Step, axis
from passes.proof.terms import plain

__all__ = [
    "all_gather",
    "all_reduce",
    "broadcast_from_first",
    "deduplicate_gradient",
    "enter",
    "enter_overlapping",
    "norm_over_shards",
    "vocab_embedding",
    "vocab_loss",
]


def all_reduce(proof: Proof, step: Step) -> Claim:
    """P -> I."""
    source, group = list(step.args.values())[:2]
    claim = proof.claim(source)
    if claim.uncounted is not None:
        raise Unproved(
            "a sum that counts every index once",
            "one over indices that several ranks hold",
            "they would count more than once",
        )
    if not claim.pending:
        raise Unproved("a pending sum", f"a value that is {claim}", f"it would be multiplied by the {proof.tp} ranks")
    _whole_group(proof, group)
    dims = wholly(proof.terms.shapes[claim.term])
    return Claim(claim.term, dims, "complete" if proof.terms.grads[claim.term] else None)


def _whole_group(proof: Proof, group: Any) -> None:
    if proof.same(group) != GROUP:
        raise Unproved("a collective over all ranks", f"one over {group!r}", "parts of other ranks would be left out")


def _is_same(split: Split | None, runs: Sequence[Any], size: int) -> bool:
    """Whether index runs per rank are what a split says."""
    lists = [
        np.concatenate([np.arange(a, b) for a, b in each]) if each else np.empty(0, dtype=np.int64) for each in runs
    ]
    have = [np.arange(size)] * len(lists) if split is None else split.ranks
    return all(np.array_equal(a, b) for a, b in zip(lists, have, strict=True))


def _places(proof: Proof, claim: Claim, places: Any) -> None:
    places = proof.same(places)
    named = dict(places)
    for d, dim in enumerate(claim.dims):
        splits = [split for _, split in dim if split is not None]
        if not splits and d not in named:
            continue
        once = all(len(np.unique(each)) == len(each) for split in splits for each in split.ranks)
        if len(dim) != 1 or d not in named or not once or not _is_same(dim[0][1], named[d], dim[0][0].number):
            raise Unproved(
                "the indices that the ranks hold", f"others, of what is {claim}", "parts would be put in other places"
            )


def _covered(splits: Sequence[Split]) -> bool:
    """Whether every index of the product of split factors is on some rank."""
    held = np.zeros([s.size for s in splits], dtype=bool)
    for rank in range(len(splits[0].ranks)):
        held[np.ix_(*(s.ranks[rank] for s in splits))] = True
    return bool(held.all())


def all_gather(proof: Proof, step: Step) -> Claim:
    """V -> I."""
    source, places, group = list(step.args.values())[:3]
    claim = require_reduced(proof.claim(source))
    _places(proof, claim, places)
    _whole_group(proof, group)
    if claim.splits and not counted_once(claim.splits) and not _covered(claim.splits):
        raise Unproved("every index on some rank", str(claim), "places would be left empty")
    if proof.terms.grads[claim.term] and claim.grad not in ("partial", "both"):
        raise Unproved(
            "a value whose gradient is in parts", f"one that is {claim}", "replicas would get none of its gradient"
        )
    dims = wholly(proof.terms.shapes[claim.term])
    return Claim(claim.term, dims, "complete" if proof.terms.grads[claim.term] else None)


def broadcast_from_first(proof: Proof, step: Step) -> Claim:
    """The first rank's copy of what each has made of its own shards."""
    source, group = list(step.args.values())[:2]
    claim = require_reduced(proof.claim(source))
    _whole_group(proof, group)
    if not claim.whole or claim.grad == "complete":
        raise Unproved(
            "a whole value whose gradient is in parts", str(claim), "its gradient would be dropped on other ranks"
        )
    return Claim(claim.term, claim.dims, "complete" if proof.terms.grads[claim.term] else None)


def deduplicate_gradient(proof: Proof, step: Step) -> Claim:
    """R -> I, of a shard: of what several ranks hold one takes the gradient."""
    source, dim, mine = list(step.args.values())[:3]
    claim = require_reduced(proof.claim(source))
    if claim.grad is None:
        return claim
    d = axis(proof.same(dim), len(claim.dims))
    splits = [split for _, split in claim.dims[d] if split is not None]
    if len(claim.splits) != 1 or len(splits) != 1 or len(claim.dims[d]) != 1:
        raise Unproved("a value split along this dim", str(claim), "gradients would be counted by no rule")
    counted = np.zeros(splits[0].size, dtype=int)
    for rank, runs in enumerate(proof.ranks(mine)):
        places = [p for a, b in runs for p in range(a, b)]
        if any(p >= splits[0].counts[rank] for p in places):
            raise Unproved("positions that the rank holds", str(runs), "the program would fail")
        np.add.at(counted, splits[0].ranks[rank][places], 1)
    if (counted != 1).any() or claim.grad == "complete":
        raise Unproved(
            "a gradient in parts, of which one rank takes that of each index",
            f"one that is {claim}",
            "it would be lost or counted more than once",
        )
    return Claim(claim.term, claim.dims, "complete")


def enter(proof: Proof, step: Step) -> Any:
    """I -> R, over all ranks, or over those that hold the same."""
    source, group = list(step.args.values())[:2]
    sources = source if isinstance(source, tuple) else (source,)
    found = tuple(_entered(proof, require_reduced(proof.claim(n)), proof.same(group)) for n in sources)
    return found if isinstance(source, tuple) else found[0]


def _summed(claim: Claim) -> Claim:
    """What has entered: the gradient that arrives behind is in parts, for they are summed."""
    if claim.grad != "complete":
        raise Unproved(
            "a value whose gradient is complete", f"one that is {claim}", "its gradient would be summed twice"
        )
    return Claim(claim.term, claim.dims, "partial")


def _entered(proof: Proof, claim: Claim, group: str) -> Claim:
    if claim.grad is None:
        return claim
    entered = _summed(claim)
    parent, parts = parse_group(group)
    if parent != GROUP:
        raise Unproved("the group of all ranks", repr(group), "gradients would be summed over others")
    held: dict[tuple[Any, ...], list[int]] = {}
    for rank in range(proof.tp):
        held.setdefault(tuple(s.ranks[rank].tobytes() for s in claim.splits), []).append(rank)
    want = sorted(held.values())
    if sorted(parts or [list(range(proof.tp))]) != want:
        raise Unproved(
            f"a sum over the ranks that hold the same ({want})",
            f"one over {parts or 'all'}",
            "the gradient would lack parts or have others'",
        )
    total = sum(len(claim.splits[0].ranks[ranks[0]]) for ranks in want) if claim.splits else 0
    if len(claim.splits) > 1 or (claim.splits and total != claim.splits[0].size):
        raise Unproved("ranks that hold the same or nothing in common", str(claim), "overlaps would not be summed")
    return entered


def enter_overlapping(proof: Proof, step: Step) -> Claim:
    """I -> R where ranks hold overlapping parts."""
    source, places, group = list(step.args.values())[:3]
    claim = require_reduced(proof.claim(source))
    if claim.grad is None:
        return claim
    _places(proof, claim, places)
    _whole_group(proof, group)
    return _summed(claim)


def vocab_embedding(proof: Proof, step: Step) -> Claim:
    """The words that a rank holds, zeros for others: a pending sum."""
    weight, ids, starts, words, padding = [*step.args.values(), -1][:5]
    table, indices = require_reduced(proof.claim(weight)), require_reduced(proof.claim(ids))
    named = {"weight": ("term", table.term), "indices": ("term", indices.term)}
    named |= {} if proof.same(padding) == -1 else {"padding_idx": proof.key(proof.same(padding))}
    term = proof.known(("aten.embedding", tuple(sorted(named.items()))), "a look-up")
    _run_of(proof, table.dims[0], starts, words)
    if not indices.whole or any(not is_whole(dim) for dim in table.dims[1:]):
        raise Unproved("whole ids and features", f"{indices}; {table}", "other rows would be read")
    dims = (*indices.dims, *table.dims[1:])
    result_gradient(proof.terms, term, dims, True, [(table, True)])
    return Claim(term, dims, pending=True)


def _run_of(proof: Proof, dim: Dim, starts: Any, size: Any) -> None:
    """That a dim is split in one run for each rank, from the start that it is told."""
    ((whole, split),) = dim
    if split is None or not counted_once((split,)) or whole.number != proof.same(size):
        raise Unproved("every index on one rank", str(Claim(0, (dim,))), "some would count twice or never")
    for rank in range(proof.tp):
        start = plain(proof.at(starts, rank))
        if not np.array_equal(split.ranks[rank], np.arange(start, start + split.counts[rank])):
            raise Unproved(
                f"indices from {split.ranks[rank][:1].tolist()} on rank {rank}",
                f"a start of {start}",
                "others' would be read",
            )


def vocab_loss(proof: Proof, step: Step) -> Claim:
    """Cross entropy of logits of which each rank holds some classes."""
    defaults = [None, False, 0, 0, 1, -100, GROUP, None, 0.0]
    given = list(step.args.values())
    logits, target, starts, classes, reduction, ignore, group, weight, smoothing = given + defaults[len(given) :]
    held, labels = require_reduced(proof.claim(logits)), require_reduced(proof.claim(target))
    _whole_group(proof, group)
    named: dict[str, Any] = {"self": ("term", held.term), "target": ("term", labels.term)}
    if weight is not None:
        named["weight"] = ("term", proof.claim(weight).term)
    for name, value, default in (
        ("reduction", reduction, 1),
        ("ignore_index", ignore, -100),
        ("label_smoothing", smoothing, 0.0),
    ):
        if proof.same(value) != default:
            named[name] = proof.key(proof.same(value))
    term = proof.known(("aten.cross_entropy_loss", tuple(sorted(named.items()))), "a loss")
    _run_of(proof, held.dims[-1], starts, classes)
    if not labels.whole or not all(is_whole(dim) for dim in held.dims[:-1]):
        raise Unproved("whole rows and labels", f"{held}; {labels}", "rows would be left out")
    if weight is not None and not proof.claim(weight).whole:
        raise Unproved("the weights of all classes", str(proof.claim(weight)), "classes would count otherwise")
    dims = wholly(proof.terms.shapes[term])
    return Claim(term, dims, "complete" if proof.terms.grads[term] else None)


def _norm_of(proof: Proof, x: int, weight: Any, bias: Any, eps: Any, centered: bool) -> int:
    """The norm over one dim that the dense model takes with these arguments."""
    name, default = ("aten.layer_norm", 1e-5) if centered else ("aten.rms_norm", None)
    given = {k: proof.key(v) for k, v in (("weight", weight), ("bias", bias)) if v is not None}
    known: list[Any] = list(proof.terms.placed["norm", x].items())
    for (op, arguments), term in known:
        args = dict(arguments)
        same = {k: args[k] for k in ("weight", "bias") if k in args} == given and args.get("eps", default) == eps
        if op == name and same and len(args["normalized_shape"]) == 1:
            return int(term)
    raise Unproved("a norm that the dense model computes", "another", "values would be scaled otherwise")


def norm_over_shards(proof: Proof, step: Step) -> Claim:
    """A norm over features of which each rank holds some."""
    x, weight, bias, eps, counts, centered, group = list(step.args.values())[:7]
    claim = require_reduced(proof.claim(x))
    _whole_group(proof, group)
    operands = [claim, *(proof.claim(n) for n in (weight, bias) if n is not None)]
    term = _norm_of(proof, claim.term, weight, bias, proof.same(eps), proof.same(centered))
    ((size, split),) = claim.dims[-1]
    if split is None or len(claim.splits) != 1 or any(c.dims[-1] != claim.dims[-1] for c in operands):
        raise Unproved(
            "features split alike on every operand",
            "; ".join(map(str, operands)),
            "features would be scaled by others' weights",
        )
    counted = np.zeros(size.number, dtype=np.int64)
    for rank, count in enumerate(proof.same(counts)):
        if count not in (0, split.counts[rank]):
            raise Unproved(f"{split.counts[rank]} features on rank {rank}", str(count), "the norm would be another")
        if count:
            np.add.at(counted, split.ranks[rank], 1)
    if (counted != 1).any():
        raise Unproved(
            "every feature to count once", "some that count more than once or never", "the norm would be another"
        )
    grad = result_gradient(proof.terms, term, claim.dims, False, [(c, False) for c in operands])
    if grad == "complete":
        raise Unproved("operands whose gradients are in parts", str(claim), "their gradients would be in parts")
    return Claim(term, claim.dims).with_grad(grad)
