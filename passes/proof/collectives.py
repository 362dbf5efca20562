"""collectives: proof rules for collectives and for other ops that work across ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from passes.layouts.sharded_value import GROUP
from passes.ops.context import parse_group
from passes.proof.claims import Claim, Dim, Split, Unproved, is_partition, is_unsplit, unsplit_dims
from passes.proof.results import require_reduced, result_gradient
from passes.proof.steps import Proof, Step, normalize_dim
from passes.proof.terms import static_int

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
    """P -> I: the sum of the ranks' partial sums."""
    source, group = list(step.args.values())[:2]
    claim = proof.claim(source)
    if claim.unweighted is not None:
        raise Unproved(
            "a sum that counts every index once",
            "one over indices that several ranks hold",
            "these indices would count more than once",
        )
    if not claim.pending:
        raise Unproved(
            "a partial sum", f"a value that is {claim}", f"the {proof.tp} ranks would add it {proof.tp} times"
        )
    _require_all_ranks(proof, group)
    dims = unsplit_dims(proof.terms.shapes[claim.term])
    return Claim(claim.term, dims, "complete" if proof.terms.grads[claim.term] else None)


def _require_all_ranks(proof: Proof, group: Any) -> None:
    """Raise if a collective is not over all ranks."""
    if proof.uniform(group) != GROUP:
        raise Unproved("a collective over all ranks", f"one over {group!r}", "other ranks' shards would be left out")


def _matches_split(split: Split | None, runs: Sequence[Any], size: int) -> bool:
    """Whether each rank's runs of indices are those of a split."""
    lists = [
        np.concatenate([np.arange(a, b) for a, b in ranges]) if ranges else np.empty(0, dtype=np.int64)
        for ranges in runs
    ]
    indices = [np.arange(size)] * len(lists) if split is None else split.ranks
    return all(np.array_equal(a, b) for a, b in zip(lists, indices, strict=True))


def _require_indices(proof: Proof, claim: Claim, runs_by_dim: Any) -> None:
    """Raise if the runs of indices that an op is given, by dim and rank, are not those that the ranks hold."""
    runs = dict(proof.uniform(runs_by_dim))
    for d, dim in enumerate(claim.dims):
        splits = [split for _, split in dim if split is not None]
        if not splits and d not in runs:
            continue
        once = all(len(np.unique(indices)) == len(indices) for split in splits for indices in split.ranks)
        if len(dim) != 1 or d not in runs or not once or not _matches_split(dim[0][1], runs[d], dim[0][0].number):
            raise Unproved(
                "the indices that the ranks hold", f"others, of a value that is {claim}", "shards would be misplaced"
            )


def _covers(splits: Sequence[Split]) -> bool:
    """Whether every index of the product of splits is on some rank."""
    held = np.zeros([s.size for s in splits], dtype=bool)
    for rank in range(len(splits[0].ranks)):
        held[np.ix_(*(s.ranks[rank] for s in splits))] = True
    return bool(held.all())


def all_gather(proof: Proof, step: Step) -> Claim:
    """V -> I: the full value from its shards."""
    source, runs, group = list(step.args.values())[:3]
    claim = require_reduced(proof.claim(source))
    _require_indices(proof, claim, runs)
    _require_all_ranks(proof, group)
    if claim.splits and not is_partition(claim.splits) and not _covers(claim.splits):
        raise Unproved("every index on some rank", str(claim), "elements would be missing")
    if proof.terms.grads[claim.term] and claim.grad not in ("partial", "both"):
        raise Unproved(
            "a value whose gradient is a partial sum", f"one that is {claim}", "replicas would get none of its gradient"
        )
    dims = unsplit_dims(proof.terms.shapes[claim.term])
    return Claim(claim.term, dims, "complete" if proof.terms.grads[claim.term] else None)


def broadcast_from_first(proof: Proof, step: Step) -> Claim:
    """The first rank's copy of a value that each rank has computed from its own shards."""
    source, group = list(step.args.values())[:2]
    claim = require_reduced(proof.claim(source))
    _require_all_ranks(proof, group)
    if not claim.replicated or claim.grad == "complete":
        raise Unproved(
            "a replicated value whose gradient is a partial sum",
            str(claim),
            "its gradient would be dropped on other ranks",
        )
    return Claim(claim.term, claim.dims, "complete" if proof.terms.grads[claim.term] else None)


def deduplicate_gradient(proof: Proof, step: Step) -> Claim:
    """R -> I for a shard: of the ranks that hold an index one takes its gradient."""
    source, dim, positions = list(step.args.values())[:3]
    claim = require_reduced(proof.claim(source))
    if claim.grad is None:
        return claim
    d = normalize_dim(proof.uniform(dim), len(claim.dims))
    splits = [split for _, split in claim.dims[d] if split is not None]
    if len(claim.splits) != 1 or len(splits) != 1 or len(claim.dims[d]) != 1:
        raise Unproved("a value split along this dim", str(claim), "no rule says how gradients would be counted")
    counted = np.zeros(splits[0].size, dtype=int)
    for rank, runs in enumerate(proof.per_rank(positions)):
        local = [p for a, b in runs for p in range(a, b)]
        if any(p >= splits[0].counts[rank] for p in local):
            raise Unproved("positions that the rank holds", str(runs), "the program would fail")
        np.add.at(counted, splits[0].ranks[rank][local], 1)
    if (counted != 1).any() or claim.grad == "complete":
        raise Unproved(
            "a gradient that is a partial sum, each index of which one rank takes",
            f"one that is {claim}",
            "it would be lost, or counted more than once",
        )
    return Claim(claim.term, claim.dims, "complete")


def enter(proof: Proof, step: Step) -> Any:
    """I -> R, over all ranks, or over groups of ranks that hold the same shard."""
    source, group = list(step.args.values())[:2]
    sources = source if isinstance(source, tuple) else (source,)
    entered = tuple(_enter_one(proof, require_reduced(proof.claim(n)), proof.uniform(group)) for n in sources)
    return entered if isinstance(source, tuple) else entered[0]


def _enter_gradient(claim: Claim) -> Claim:
    """The claim after ``enter``: its backward adds the ranks' gradients, so each may be a partial sum."""
    if claim.grad != "complete":
        raise Unproved(
            "a value whose gradient is complete", f"one that is {claim}", "its gradient would be summed twice"
        )
    return Claim(claim.term, claim.dims, "partial")


def _enter_one(proof: Proof, claim: Claim, group: str) -> Claim:
    """The claim of one entered value; the groups must be those of the ranks that hold the same shard."""
    if claim.grad is None:
        return claim
    entered = _enter_gradient(claim)
    parent, subgroups = parse_group(group)
    if parent != GROUP:
        raise Unproved("the group of all ranks", repr(group), "gradients would be summed over other ranks")
    holders: dict[tuple[Any, ...], list[int]] = {}
    for rank in range(proof.tp):
        holders.setdefault(tuple(s.ranks[rank].tobytes() for s in claim.splits), []).append(rank)
    want = sorted(holders.values())
    if sorted(subgroups or [list(range(proof.tp))]) != want:
        raise Unproved(
            f"a sum over the ranks that hold the same shard ({want})",
            f"one over {subgroups or 'all'}",
            "the gradient would lack contributions, or have those of other shards",
        )
    total = sum(len(claim.splits[0].ranks[ranks[0]]) for ranks in want) if claim.splits else 0
    if len(claim.splits) > 1 or (claim.splits and total != claim.splits[0].size):
        raise Unproved("ranks that hold the same shard or disjoint ones", str(claim), "overlaps would not be summed")
    return entered


def enter_overlapping(proof: Proof, step: Step) -> Claim:
    """I -> R where ranks hold overlapping shards."""
    source, runs, group = list(step.args.values())[:3]
    claim = require_reduced(proof.claim(source))
    if claim.grad is None:
        return claim
    _require_indices(proof, claim, runs)
    _require_all_ranks(proof, group)
    return _enter_gradient(claim)


def vocab_embedding(proof: Proof, step: Step) -> Claim:
    """An embedding of a table split by rows, with zeros for ids of other ranks: a partial sum."""
    weight, ids, starts, words, padding = [*step.args.values(), -1][:5]
    table, indices = require_reduced(proof.claim(weight)), require_reduced(proof.claim(ids))
    args = {"weight": ("term", table.term), "indices": ("term", indices.term)}
    args |= {} if proof.uniform(padding) == -1 else {"padding_idx": proof.key(proof.uniform(padding))}
    term = proof.find_term(("aten.embedding", tuple(sorted(args.items()))), "a look-up")
    _require_contiguous(proof, table.dims[0], starts, words)
    if not indices.replicated or any(not is_unsplit(dim) for dim in table.dims[1:]):
        raise Unproved("replicated ids, and unsplit features", f"{indices}; {table}", "other rows would be read")
    dims = (*indices.dims, *table.dims[1:])
    result_gradient(proof.terms, term, dims, True, [(table, True)])
    return Claim(term, dims, pending=True)


def _require_contiguous(proof: Proof, dim: Dim, starts: Any, size: Any) -> None:
    """Raise unless each rank holds one run of a dim, from the start that the op is given, and no two share an index."""
    ((full, split),) = dim
    if split is None or not is_partition((split,)) or full.number != proof.uniform(size):
        raise Unproved("every index on one rank", str(Claim(0, (dim,))), "some would count twice, or never")
    for rank in range(proof.tp):
        start = static_int(proof.on_rank(starts, rank))
        if not np.array_equal(split.ranks[rank], np.arange(start, start + split.counts[rank])):
            raise Unproved(
                f"indices from {split.ranks[rank][:1].tolist()} on rank {rank}",
                f"a start of {start}",
                "another rank's would be read",
            )


def vocab_loss(proof: Proof, step: Step) -> Claim:
    """Cross entropy of logits that are split by classes."""
    defaults = [None, False, 0, 0, 1, -100, GROUP, None, 0.0]
    arguments = list(step.args.values())
    logits, target, starts, classes, reduction, ignore, group, weight, smoothing = (
        arguments + defaults[len(arguments) :]
    )
    scores, labels = require_reduced(proof.claim(logits)), require_reduced(proof.claim(target))
    _require_all_ranks(proof, group)
    args: dict[str, Any] = {"self": ("term", scores.term), "target": ("term", labels.term)}
    if weight is not None:
        args["weight"] = ("term", proof.claim(weight).term)
    for name, value, default in (
        ("reduction", reduction, 1),
        ("ignore_index", ignore, -100),
        ("label_smoothing", smoothing, 0.0),
    ):
        if proof.uniform(value) != default:
            args[name] = proof.key(proof.uniform(value))
    term = proof.find_term(("aten.cross_entropy_loss", tuple(sorted(args.items()))), "a loss")
    _require_contiguous(proof, scores.dims[-1], starts, classes)
    if not labels.replicated or not all(is_unsplit(dim) for dim in scores.dims[:-1]):
        raise Unproved("unsplit rows, and replicated labels", f"{scores}; {labels}", "rows would be left out")
    if weight is not None and not proof.claim(weight).replicated:
        raise Unproved("the weights of all classes", str(proof.claim(weight)), "classes would have other weights")
    dims = unsplit_dims(proof.terms.shapes[term])
    return Claim(term, dims, "complete" if proof.terms.grads[term] else None)


def _find_norm(proof: Proof, x: int, weight: Any, bias: Any, eps: Any, centered: bool) -> int:
    """The term of the dense model's norm over one dim with these arguments."""
    name, default = ("aten.layer_norm", 1e-5) if centered else ("aten.rms_norm", None)
    vectors = {k: proof.key(v) for k, v in (("weight", weight), ("bias", bias)) if v is not None}
    known: list[Any] = list(proof.terms.variants["norm", x].items())
    for (op, arguments), term in known:
        args = dict(arguments)
        same = {k: args[k] for k in ("weight", "bias") if k in args} == vectors and args.get("eps", default) == eps
        if op == name and same and len(args["normalized_shape"]) == 1:
            return int(term)
    raise Unproved("a norm that the dense model computes", "another", "values would be scaled by other factors")


def norm_over_shards(proof: Proof, step: Step) -> Claim:
    """A norm over split features."""
    x, weight, bias, eps, counts, centered, group = list(step.args.values())[:7]
    claim = require_reduced(proof.claim(x))
    _require_all_ranks(proof, group)
    operands = [claim, *(proof.claim(n) for n in (weight, bias) if n is not None)]
    term = _find_norm(proof, claim.term, weight, bias, proof.uniform(eps), proof.uniform(centered))
    ((size, split),) = claim.dims[-1]
    if split is None or len(claim.splits) != 1 or any(c.dims[-1] != claim.dims[-1] for c in operands):
        raise Unproved(
            "features split alike on every operand",
            "; ".join(map(str, operands)),
            "features would be scaled by others' weights",
        )
    counted = np.zeros(size.number, dtype=np.int64)
    for rank, count in enumerate(proof.uniform(counts)):
        if count not in (0, split.counts[rank]):
            raise Unproved(f"{split.counts[rank]} features on rank {rank}", str(count), "the norm would be wrong")
        if count:
            np.add.at(counted, split.ranks[rank], 1)
    if (counted != 1).any():
        raise Unproved(
            "every feature to count once", "some that count more than once, or never", "the norm would be wrong"
        )
    grad = result_gradient(proof.terms, term, claim.dims, False, [(c, False) for c in operands])
    if grad == "complete":
        raise Unproved(
            "operands whose gradients are partial sums", str(claim), "their gradients would be taken for complete"
        )
    return Claim(term, claim.dims).with_grad(grad)
