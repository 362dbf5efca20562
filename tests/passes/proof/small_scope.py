"""Rules of the proof against real arithmetic, in small scope: every layout of small operands.

A case is one op of the dense model and one of the rewritten graph, with operands of which every rank holds
something: all that a menu of index lists per dim gives. The rule is asked first. What it claims is then
computed: every rank runs the op on what it holds, in lockstep where ranks exchange, and the results must be
what the claim says of the dense result; gradients of the kind that the claim names are sent back, and what
arrives at every operand must be of the kind that the operand's claim named.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from autotp.verification.threads import World, lockstep
from passes.layouts.axes import Size
from passes.layouts.sharded_value import PerRank
from passes.proof.claims import Claim, Dim, Unproved, split_of
from passes.proof.dense import read
from passes.proof.rules import follow
from passes.proof.steps import Proof

Held = tuple[tuple[int, ...], ...]
"""The indices of a dim that each rank holds, in its order."""


def menu(size: int, tp: int, short: bool = False) -> list[Held]:
    """Ways for ranks to hold a dim: whole, in runs, swapped, strided, overlapping, with gaps, copied, out of order."""
    every = tuple(range(size))
    if size == 1:
        return [(every,) * tp]
    cuts = [round(size * r / tp) for r in range(tp + 1)]
    runs = tuple(every[a:b] for a, b in itertools.pairwise(cuts))
    found = [(every,) * tp, runs, runs[::-1], (every[:-1], *[every[1:]] * (tp - 1))]
    if not short:
        uneven = (every[:1], every[1:], *[()] * (tp - 2))
        found += [
            tuple(every[r::tp] for r in range(tp)),  # strided
            uneven,
            (every, *[()] * (tp - 1)),  # all on the first
            (every[:1],) * tp,  # a part, copied, and gaps
            (every[:1], *[every[1:2]] * (tp - 1)),  # copies on some ranks, gaps where there are more
            (every[::-1],) * tp,  # out of order
            (every[:1] * 2, *[every[1:]] * (tp - 1)),  # the same one twice
        ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Operand:
    """What ranks hold of an operand, and of what kind its gradient is."""

    held: tuple[Held, ...]
    grad: str | None
    pending: bool = False


@dataclass(frozen=True)
class Leaf:
    """A tensor that the op reads.

    Attributes:
        value: the dense value.
        operands: what ranks may hold of it.
    """

    value: torch.Tensor
    operands: Sequence[Operand]


def operands(
    shape: Sequence[int], tp: int, grads: Sequence[str | None] = ("complete", "partial"), pending: bool = False,
    short: bool = False,
) -> list[Operand]:  # fmt: skip
    """Everything that ranks may hold of a value."""
    found = [Operand(h, g) for h in itertools.product(*(menu(n, tp, short) for n in shape)) for g in grads]
    whole = tuple((tuple(range(n)),) * tp for n in shape)
    return found + ([Operand(whole, None, pending=True)] if pending else [])


def leaf(*shape: int, tp: int, **options: Any) -> Leaf:
    """A float operand that gradients flow to."""
    generator = torch.Generator().manual_seed(sum((i + 3) * n for i, n in enumerate(shape)))
    return Leaf(torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5, operands(shape, tp, **options))


def numbers(value: torch.Tensor, tp: int, **options: Any) -> Leaf:
    """An operand that no gradients flow to: ids, masks."""
    return Leaf(value, operands(value.shape, tp, grads=(None,), **options))


Call = Callable[[fx.Graph, list[fx.Node]], fx.Node]
"""Writes the op into a graph."""


@dataclass(frozen=True)
class Case:
    """One op of the dense model, and ways to write it in the rewritten graph.

    Attributes:
        dense: the op on dense operands.
        leaves: its operands.
        tp: the number of ranks.
        rewritten: the same on what ranks hold, some right, some wrong; the dense call if left out.
        exchanges: whether ranks exchange in it, so that they must run at once.
    """

    dense: Call
    leaves: tuple[Leaf, ...]
    tp: int
    rewritten: Callable[[tuple[Operand, ...]], Iterator[Call]] | None = None
    exchanges: bool = False


@dataclass
class Count:
    """How many programs were refused and how many claimed, and the claims that are wrong.

    Torch has no kernel for some ops on a tensor of no elements: where a rank holds none, its refusal is counted.
    """

    refused: int = 0
    claimed: int = 0
    grads: int = 0
    failed: int = 0
    wrong: list[str] = field(default_factory=list)


def calling(target: Any, *args: Any, **kwargs: Any) -> Call:
    """A call whose first arguments are the operands, but for those that stand elsewhere (``HERE``, ``REST``)."""

    def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        left = iter(nodes)
        spelled = [next(left) if a is HERE else list(left) if a is REST else a for a in args]
        return graph.call_function(target, (*left, *spelled), kwargs)

    return call


def function(graph: fx.Graph, name: str, of: Callable[..., Any]) -> fx.Node:
    """A function that an op of the graph calls."""
    node = graph.create_node("get_attr", name)
    node.meta["region"] = fx.symbolic_trace(of)
    return node


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
HERE, REST = object(), object()
"""Where the next operand, or a list of the others, stands among a call's arguments."""


def _graph(leaves: Sequence[Leaf], call: Call) -> tuple[fx.Graph, list[fx.Node], fx.Node]:
    graph = fx.Graph()
    nodes = []
    for i, each in enumerate(leaves):
        node = graph.create_node("get_attr", f"leaf{i}")
        node.meta["val"] = each.value
        nodes.append(node)
    return graph, nodes, call(graph, nodes)


def _runs(value: Any, found: dict[fx.Node, Any], rank: int) -> Any:
    """What a node, or an argument with nodes in it, is on one rank."""
    if isinstance(value, PerRank):
        return _runs(value.values[rank], found, rank)
    if isinstance(value, (list, tuple)):
        return type(value)(_runs(v, found, rank) for v in value)
    if isinstance(value, dict):
        return {k: _runs(v, found, rank) for k, v in value.items()}
    if not isinstance(value, fx.Node):
        return value
    if "region" in value.meta:
        return value.meta["region"]
    if value not in found:
        args, kwargs = _runs(value.args, found, rank), _runs(value.kwargs, found, rank)
        if value.target is _ATTENTION and any(x.shape[1] == 0 for x in args[:3]):
            raise ValueError("an attention of no heads")  # torch 2.11 divides by them, which ends the process
        found[value] = value.target(*args, **kwargs)
    return found[value]


def claim_of(term: int, shape: Sequence[int], operand: Operand) -> Claim:
    dims = tuple(_dim(size, held) for size, held in zip(shape, operand.held, strict=True))
    return Claim(term, dims, pending=operand.pending).with_grad(operand.grad)


@functools.cache
def _dim(size: int, held: Held) -> Dim:
    return () if size == 1 else ((Size(size), split_of(size, [np.array(h, dtype=np.int64) for h in held])),)


def lists_of(claim: Claim, rank: int, shape: Sequence[int]) -> list[np.ndarray]:
    """The indices that a rank holds of each dim, by a claim."""
    found = []
    for dim, size in zip(claim.dims, shape, strict=True):
        split = dim[0][1] if dim else None
        found.append(np.arange(size) if split is None else split.ranks[rank])
    return found


def classes_of(claim: Claim, shape: Sequence[int]) -> list[np.ndarray]:
    """Which indices of each dim stand for each other."""
    found = []
    for dim, size in zip(claim.dims, shape, strict=True):
        split = dim[0][1] if dim else None
        found.append(np.arange(size) if split is None or split.value_ids is None else split.value_ids)
    return found


def _at(value: torch.Tensor, lists: Sequence[np.ndarray]) -> torch.Tensor:
    return value[np.ix_(*lists)] if lists else value


def _classes(value: np.ndarray, lists: Sequence[np.ndarray], classes: Sequence[np.ndarray]) -> np.ndarray:
    """What a rank's elements add up to, class by class."""
    out = np.zeros([int(c.max(initial=-1)) + 1 for c in classes])
    np.add.at(out, np.ix_(*(c[each] for c, each in zip(classes, lists, strict=True))), value)
    return out


def _close(a: Any, b: Any) -> bool:
    a, b = (x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in (a, b))
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True))


def check(case: Case, stop: int = 5) -> Count:
    """Every program that a case has: what is claimed of it must be so."""
    count, world = Count(), World(case.tp)
    dense, nodes, result = _graph(case.leaves, case.dense)
    wanted = [each.operands[0].grad is not None for each in case.leaves]
    values = [
        each.value.clone().requires_grad_(True) if w else each.value
        for each, w in zip(case.leaves, wanted, strict=True)
    ]
    computed = dict(zip(nodes, values, strict=True))
    whole = _runs(result, computed, 0)
    for node in dense.nodes:
        if node in computed:
            node.meta["val"] = computed[node]
    dense.output((result,))
    parameters = [f"leaf{i}" for i, w in enumerate(wanted) if w]
    terms, meant = read(dense, parameters)
    same = [_graph(case.leaves, case.dense)]
    for chosen in itertools.product(*(each.operands for each in case.leaves)):
        written = (_graph(case.leaves, call) for call in case.rewritten(chosen)) if case.rewritten else same
        for graph, mine, last in written:
            proof = Proof(terms, case.tp)
            for node, original, each, operand in zip(mine, nodes, case.leaves, chosen, strict=True):
                proof.values[node] = claim_of(meant[original], each.value.shape, operand)
            try:
                for node in graph.nodes:
                    if node.op == "call_function":
                        proof.values[node] = follow(proof, node)
                    elif "region" in node.meta:
                        proof.values[node] = ("region", str(node.target))
                found = proof.values[last]
            except Unproved:
                count.refused += 1
                continue
            claims = found if isinstance(found, list) else [found]
            claims = [c for c in claims if isinstance(c, Claim) and c.term == meant[result]]
            if not claims:  # of another value than this one
                count.refused += 1
                continue
            start = [proof.values[n] for n in mine]
            for claim in claims:
                count.claimed += 1
                wrong = _judge(case, world, values, whole, mine, last, start, claim, wanted, count)
                if wrong:
                    given = "; ".join(f"{o.held} {o.grad}" + " pending" * o.pending for o in chosen)
                    count.wrong.append(f"{last.format_node()} of {given}: claimed {claim}: {wrong}")
                    if len(count.wrong) >= stop:
                        return count
    return count


def assert_sound(cases: list[Case]) -> None:
    """What is claimed of any program of the cases is so; some are claimed, some refused, some have gradients."""
    counts = [check(case) for case in cases]
    for count in counts:
        assert not count.wrong, "\n".join(count.wrong)
        assert count.claimed, "no program of this case was claimed"
    assert any(count.refused for count in counts)
    assert any(count.grads for count in counts)


def _judge(
    case: Case, world: World, values: list[torch.Tensor], whole: torch.Tensor, nodes: list[fx.Node], last: fx.Node,
    start: list[Claim], claim: Claim, wanted: list[bool], count: Count,
) -> str:  # fmt: skip
    """What is wrong with a claim; nothing if it is so."""
    generator = np.random.default_rng(0)
    shapes = [tuple(v.shape) for v in values]
    local: list[list[torch.Tensor]] = [[] for _ in range(case.tp)]
    for value, each, want, shape in zip(values, start, wanted, shapes, strict=True):
        left = value.detach().clone()
        for rank in range(case.tp):
            part = _at(value.detach(), lists_of(each, rank, shape))
            if each.pending:
                part = left if rank == case.tp - 1 else torch.as_tensor(generator.standard_normal(shape))
                left = left - part
            local[rank].append(part.clone().requires_grad_(want))

    def forward(rank: int) -> Any:
        return _runs(last, dict(zip(nodes, local[rank], strict=True)), rank)

    try:
        ran = _ranks(case, world, forward)
    except Exception as error:
        return _failure(error, local, count)
    shape, lists = tuple(whole.shape), [lists_of(claim, r, tuple(whole.shape)) for r in range(case.tp)]
    if claim.unweighted is not None:
        return ""  # judged with the product that makes it count
    if claim.pending:
        if not _close(sum(ran), whole):
            return "the ranks' values do not add up to the dense one"
    else:
        for rank in range(case.tp):
            if not _close(ran[rank], _at(whole, lists[rank])):
                return f"rank {rank} holds other values"
    if not whole.requires_grad or (claim.grad is None and not claim.pending):
        return ""
    count.grads += 1
    classes = classes_of(claim, shape)
    holders = sum(_classes(np.ones([len(x) for x in each]), each, classes) for each in lists)
    seen = (holders > 0)[np.ix_(*classes)] if classes else holders > 0
    gradient = generator.standard_normal(shape) * seen  # what nobody holds nobody goes on with
    grads = torch.autograd.grad(
        whole, [v for v, w in zip(values, wanted, strict=True) if w], torch.as_tensor(gradient), retain_graph=True,
        allow_unused=True,
    )  # fmt: skip
    sent = [gradient[np.ix_(*each)] if each else gradient for each in lists]
    if claim.grad == "partial":
        sent = _in_parts(gradient, lists, classes, generator)

    def backward(rank: int) -> Any:
        leaves = [x for x, w in zip(local[rank], wanted, strict=True) if w]
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(ran[rank], leaves, torch.as_tensor(sent[rank]), allow_unused=True)

    try:
        arrived = _ranks(case, world, backward)
    except Exception as error:
        return _failure(error, local, count)
    at = iter(range(len(grads)))
    for i, (each, want) in enumerate(zip(start, wanted, strict=True)):
        if want:
            number = next(at)
            parts = [np.zeros(tuple(local[r][i].shape)) if (g := arrived[r][number]) is None else g.numpy()
                     for r in range(case.tp)]  # fmt: skip
            expected = np.zeros(shapes[i]) if grads[number] is None else grads[number].numpy()
            wrong = _gradient(each, parts, expected, shapes[i])
            if wrong:
                return f"operand {i}: {wrong}"
    return ""


def _in_parts(
    whole: np.ndarray, lists: list[list[np.ndarray]], classes: list[np.ndarray], generator: np.random.Generator
) -> list[np.ndarray]:
    """Random gradients of what each rank holds, which add up to a whole one."""
    parts = [generator.standard_normal([len(x) for x in each]) for each in lists]
    parts = [np.asarray(part) for part in parts]
    missing = _classes(whole, [np.arange(n) for n in whole.shape], classes)
    for part, each in zip(parts, lists, strict=True):
        missing -= _classes(part, each, classes)
    for part, each in zip(parts, lists, strict=True):  # what is missing goes to the first that holds it
        for place in np.ndindex(part.shape):
            at = tuple(int(c[x[i]]) for c, x, i in zip(classes, each, place, strict=True))
            part[place] += missing[at]
            missing[at] = 0
    return parts


def _failure(error: Exception, local: list[list[torch.Tensor]], count: Count) -> str:
    if any(not part.numel() for held in local for part in held):
        count.failed += 1
        return ""
    return f"it does not run: {type(error).__name__}: {error}"


def _ranks(case: Case, world: World, work: Callable[[int], Any]) -> list[Any]:
    return lockstep(case.tp, world, work) if case.exchanges else [work(rank) for rank in range(case.tp)]


def _gradient(claim: Claim, parts: list[np.ndarray], dense: np.ndarray, shape: Sequence[int]) -> str:
    """What is wrong with the gradients that arrive at an operand."""
    lists = [lists_of(claim, r, shape) for r in range(len(parts))]
    if claim.pending or claim.grad in ("complete", "both"):
        for rank, part in enumerate(parts):
            if not _close(part, dense[np.ix_(*lists[rank])] if lists[rank] else dense):
                return f"its gradient on rank {rank} is not complete"
    if claim.grad in ("partial", "both"):
        places = [np.arange(n) for n in shape]
        total = sum(_classes(p, each, places) for p, each in zip(parts, lists, strict=True))
        held = sum(_classes(np.ones(p.shape), each, places) for p, each in zip(parts, lists, strict=True))
        if not _close(total, dense * (held > 0)):
            return "its gradients do not add up"
    return ""
