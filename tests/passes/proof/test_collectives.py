"""The rules of the collectives, and of the ops that work across ranks, against ranks that run in lockstep."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx

from passes import ops
from passes.layouts.sharded_value import PerRank
from passes.ops.norms import norm_over_shards
from passes.ops.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding
from tests.passes.proof.small_scope import (
    HERE,
    Call,
    Case,
    Held,
    Leaf,
    Operand,
    assert_sound,
    calling,
    leaf,
    menu,
    numbers,
)

aten = torch.ops.aten
GROUPS = {2: ("tp", "tp:0|1", "tp:0,1"), 3: ("tp", "tp:0,1|2", "tp:0,2|1", "tp:1,2|0", "tp:0|1|2")}


def itself(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    """The dense model does nothing."""
    return nodes[0]


def runs_of(indices: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    found: list[list[int]] = []
    for i in indices:
        if found and found[-1][1] == i:
            found[-1][1] = i + 1
        else:
            found.append([i, i + 1])
    return tuple((a, b) for a, b in found)


def places_of(dims: dict[int, Held]) -> Any:
    return tuple((d, tuple(runs_of(each) for each in held)) for d, held in dims.items())


def reductions(tp: int) -> list[Case]:
    def calls(_: Any) -> Iterator[Call]:
        for group in GROUPS[tp]:
            yield calling(ops.all_reduce, HERE, group)

    return [Case(itself, (leaf(2, 3, tp=tp, short=True, pending=True),), tp, calls, exchanges=True)]


def _everywhere(shape: tuple[int, ...], tp: int, target: Any) -> Callable[[Any], Iterator[Call]]:
    """A call with each dim, or both, said to be held in each way."""

    def calls(_: Any) -> Iterator[Call]:
        held = [[h for h in menu(n, tp) if all(h)] for n in shape]
        for d, each in enumerate(held):
            for way in each:
                yield calling(target, HERE, places_of({d: way}), "tp")
        yield calling(target, HERE, places_of({0: held[0][1]}), GROUPS[tp][1])
        for ways in itertools.product(*held) if len(shape) > 1 else ():
            yield calling(target, HERE, places_of(dict(enumerate(ways))), "tp")

    return calls


def gathers(tp: int) -> list[Case]:
    return [
        Case(itself, (leaf(*shape, tp=tp, short=len(shape) > 1),), tp, _everywhere(shape, tp, ops.all_gather), True)
        for shape in ((5,), (3, 2))
    ]


def entries(tp: int) -> list[Case]:
    def calls(_: Any) -> Iterator[Call]:
        for group in GROUPS[tp]:
            yield calling(ops.enter, HERE, group)

    def together(_: Any) -> Iterator[Call]:
        for group in GROUPS[tp]:

            def call(graph: fx.Graph, nodes: list[fx.Node], group: str = group) -> fx.Node:
                both = graph.call_function(ops.enter, (tuple(nodes), group))
                parts = [graph.call_function(operator.getitem, (both, i)) for i in range(2)]
                return doubled(graph, parts)

            yield call

    def doubled(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return graph.call_function(
            aten.add.Tensor, tuple(graph.call_function(aten.mul.Tensor, (n, 2.0)) for n in nodes)
        )

    return [
        Case(itself, (leaf(3, 2, tp=tp),), tp, calls, True),
        Case(doubled, (leaf(3, tp=tp), leaf(3, tp=tp)), tp, together, True),
    ]


def overlaps(tp: int) -> list[Case]:
    return [
        Case(itself, (leaf(*s, tp=tp, short=len(s) > 1),), tp, _everywhere(s, tp, ops.enter_overlapping), True)
        for s in ((5,), (3, 2))
    ]


def settlements(tp: int) -> list[Case]:
    def calls(_: Any) -> Iterator[Call]:
        yield calling(ops.broadcast_from_first, HERE, "tp")
        yield calling(ops.broadcast_from_first, HERE, GROUPS[tp][1])

    return [Case(itself, (leaf(2, 3, tp=tp, short=True, pending=True),), tp, calls, True)]


def norms(tp: int) -> list[Case]:
    def rms(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return graph.call_function(aten.rms_norm.default, (nodes[0], [5], nodes[1], 1e-5))

    def layer(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return graph.call_function(aten.layer_norm.default, (nodes[0], [5], *nodes[1:], 1e-5))

    def written(centered: bool) -> Callable[[tuple[Operand, ...]], Iterator[Call]]:
        def calls(chosen: tuple[Operand, ...]) -> Iterator[Call]:
            held = [len(each) for each in chosen[0].held[-1]]
            for counts in itertools.product(*({0, n, 1} for n in held)):

                def call(graph: fx.Graph, nodes: list[fx.Node], counts: Any = counts) -> fx.Node:
                    bias = nodes[2] if centered else None
                    return graph.call_function(
                        norm_over_shards, (nodes[0], nodes[1], bias, 1e-5, counts, centered, "tp")
                    )

                yield call

        return calls

    made, features, few = leaf(2, 5, tp=tp), leaf(5, tp=tp), leaf(5, tp=tp, short=True)
    rows = Leaf(made.value, [o for o in made.operands if o.held[0] in menu(2, tp)[:2]])
    whole = Leaf(made.value, [o for o in rows.operands if o.held[0] == ((0, 1),) * tp])
    return [
        Case(rms, (rows, features), tp, written(False), True),
        Case(layer, (whole, few, few), tp, written(True), True),
    ]


def embeddings(tp: int) -> list[Case]:
    ids = torch.tensor([[1, 0, 4], [2, 2, 3]])

    def written(padding: int | None) -> Callable[[Any], Iterator[Call]]:
        def calls(_: Any) -> Iterator[Call]:
            last = [] if padding is None else [padding]
            for starts in itertools.product(range(5), repeat=tp):
                yield calling(vocab_parallel_embedding, HERE, HERE, PerRank.of(starts), 5, *last)
            yield calling(vocab_parallel_embedding, HERE, HERE, PerRank.of((0, 2, 4)[:tp]), 6, *last)
            yield calling(vocab_parallel_embedding, HERE, HERE, PerRank.of((0, 2, 3)[:tp]), 5, 1)

        return calls

    table = leaf(5, 2, tp=tp)
    ways = menu(2, tp)[:2]
    table = Leaf(table.value, [o for o in table.operands if o.held[1] in ways])
    return [
        Case(calling(aten.embedding.default), (table, _few(ids, tp)), tp, written(None)),
        Case(calling(aten.embedding.default, HERE, HERE, 3), (table, _few(ids[:, :1], tp)), tp, written(3)),
    ]  # fmt: skip


def _few(value: torch.Tensor, tp: int) -> Leaf:
    """Numbers that are whole, or of which ranks hold rows."""
    made = numbers(value, tp, short=True)
    rest = tuple((tuple(range(n)),) * tp for n in value.shape[1:])
    return Leaf(value, [o for o in made.operands if o.held[1:] == rest][:2])


def losses(tp: int) -> list[Case]:
    target = torch.tensor([1, -100, 4])
    weights = torch.tensor([0.5, 1.5, 2.0, 1.0, 0.7], dtype=torch.float64)

    def written(*rest: Any, weighted: bool = False, smoothing: float = 0.0) -> Callable[[Any], Iterator[Call]]:
        def calls(_: Any) -> Iterator[Call]:
            ways = [(starts, 5, rest) for starts in itertools.product(range(5), repeat=tp)]
            right = (0, 2, 4)[:tp] if tp == 2 else (0, 2, 3)
            ways += [(right, 6, rest), (right, 5, (0, -100)), (right, 5, (1, 4)), (right, 5, (2, -100))]
            for starts, classes, (reduction, ignore) in ways:

                def call(
                    graph: fx.Graph, nodes: list[fx.Node], starts: Any = starts, classes: int = classes,
                    given: Any = (reduction, ignore),
                ) -> fx.Node:  # fmt: skip
                    options = (nodes[2] if weighted else None, smoothing)
                    args = (*nodes[:2], PerRank.of(starts), classes, *given, "tp", *options)
                    return graph.call_function(vocab_parallel_cross_entropy, args)

                yield call

        return calls

    def dense(reduction: int, ignore: int, smoothing: float = 0.0) -> Call:
        def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
            weight = nodes[2] if len(nodes) > 2 else None
            args = (*nodes[:2], weight, reduction, ignore, smoothing)
            return graph.call_function(aten.cross_entropy_loss.default, args)

        return call

    logits = leaf(3, 5, tp=tp, short=True)
    extra = [o for o in leaf(3, 5, tp=tp).operands if o.held[0] == ((0, 1, 2),) * tp]
    logits = Leaf(logits.value, list(dict.fromkeys([*logits.operands, *extra])))
    labels, of_classes = _few(target, tp), _few(weights, tp)
    return [
        Case(dense(1, -100), (logits, labels), tp, written(1, -100), True),
        Case(dense(2, 4), (logits, _few(torch.tensor([1, 3, 4]), tp)), tp, written(2, 4), True),
        Case(dense(0, -100, 0.1), (logits, labels), tp, written(0, -100, smoothing=0.1), True),
        Case(dense(1, -100), (logits, labels, of_classes), tp, written(1, -100, weighted=True), True),
    ]


RULES: dict[str, Callable[[int], list[Case]]] = {
    each.__name__: each
    for each in (reductions, gathers, entries, overlaps, settlements, norms, embeddings, losses)
}  # fmt: skip


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_claims_is_so(rule: str, tp: int) -> None:
    assert_sound(RULES[rule](tp))
