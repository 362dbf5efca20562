"""Each rule of the proof against real arithmetic, forward and backward, on all layouts of small operands."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # the op of grouped products
from torch import fx
from torch.nn.attention.flex_attention import create_block_mask

from passes import ops
from passes.layouts.sharded_value import PerRank
from passes.ops.single_results import flex_attention_outputs
from tests.passes.proof.small_scope import (
    HERE,
    REST,
    Call,
    Case,
    Leaf,
    Operand,
    assert_sound,
    calling,
    function,
    leaf,
    menu,
    numbers,
)

aten = torch.ops.aten
Cases = Callable[[int], list[Case]]
"""The cases of a rule for a number of ranks."""


def plain(*args: Any, **kwargs: Any) -> Callable[..., Case]:
    """A case of a call that the rewritten graph makes as the dense model does."""
    return lambda tp, *leaves, rewritten=None: Case(calling(*args, **kwargs), leaves, tp, rewritten)


def whole(*shape: int, tp: int) -> Leaf:
    """An operand that is whole."""
    made = leaf(*shape, tp=tp)
    return Leaf(made.value, made.operands[:2])


def per_rank(values: Any) -> Any:
    """An argument of which each rank has its own."""
    return PerRank.of(tuple(values))


# Index by index --------------------------------------------------------------------------------------


def pointwise(tp: int) -> list[Case]:
    mask = torch.tensor([True, False, True, True, False])
    return [
        plain(aten.mul.Tensor)(tp, leaf(2, 3, tp=tp), leaf(3, tp=tp)),
        plain(aten.gelu.default)(tp, leaf(2, 5, tp=tp)),
        plain(aten.pow.Tensor_Scalar, 3)(tp, leaf(5, tp=tp)),
        plain(aten.where.self)(tp, numbers(mask, tp), leaf(5, tp=tp), leaf(1, tp=tp)),
        plain(aten.masked_fill.Scalar, HERE, HERE, 0.5)(tp, leaf(2, 5, tp=tp, short=True), numbers(mask, tp)),
    ]


def sums(tp: int) -> list[Case]:
    pair = leaf(2, 3, tp=tp, pending=True), leaf(2, 3, tp=tp, pending=True, short=True)
    return [
        plain(aten.add.Tensor)(tp, *pair),
        plain(aten.sub.Tensor, alpha=2.0)(tp, leaf(5, tp=tp, pending=True), leaf(5, tp=tp, pending=True)),
        plain(aten.add.Tensor)(tp, leaf(2, 3, tp=tp, pending=True), leaf(3, tp=tp)),
        plain(aten.add.Tensor, HERE, 2.0)(tp, leaf(5, tp=tp, pending=True)),
        plain(aten.neg.default)(tp, leaf(5, tp=tp, pending=True)),
        plain(aten.mul.Tensor, HERE, 3.0)(tp, leaf(5, tp=tp, pending=True)),
        plain(aten.div.Tensor, HERE, 3.0)(tp, leaf(2, 5, tp=tp, pending=True)),
    ]


# Products --------------------------------------------------------------------------------------------


def matrices(tp: int) -> list[Case]:
    small: dict[str, Any] = {"tp": tp, "short": True}
    return [
        plain(aten.matmul.default)(tp, leaf(2, 5, tp=tp, short=True), leaf(5, 3, tp=tp)),
        plain(aten.matmul.default)(tp, leaf(3, 2, 5, **small), leaf(5, **small)),
        plain(aten.bmm.default)(tp, leaf(3, 1, 5, **small), leaf(3, 5, 2, **small)),
        plain(aten.linear.default)(tp, leaf(2, 3, **small), leaf(5, 3, **small), leaf(5, **small)),
        plain(aten.addmm.default, beta=2, alpha=3)(tp, leaf(5, **small), leaf(1, 3, **small), leaf(3, 5, **small)),
        plain(aten.einsum.default, "ab,bc,c->a", REST)(tp, leaf(2, 3, **small), leaf(3, 2, **small), leaf(2, **small)),
        plain(aten.einsum.default, "abc->ca", REST)(tp, leaf(2, 3, 5, **small)),
    ]


def parallel_products(tp: int) -> list[Case]:
    """The parallel counterparts, which are the dense op under another name."""
    x, weight, bias = leaf(2, 3, tp=tp), leaf(5, 3, tp=tp, short=True), leaf(5, tp=tp, short=True)

    def biased(_: Any) -> Iterator[Call]:
        yield calling(ops.column_parallel_linear)

    def bare(_: Any) -> Iterator[Call]:
        yield calling(ops.row_parallel_linear)

    return [
        plain(aten.linear.default)(tp, leaf(2, 3, tp=tp, short=True), weight, bias, rewritten=biased),
        plain(aten.linear.default)(tp, x, weight, rewritten=bare),
    ]


def attentions(tp: int) -> list[Case]:
    few: dict[str, Any] = {"tp": tp, "short": True}
    query, key, mask = _heads(3, 2, 2, tp=tp), _heads(3, 2, 2, **few), _along(0, 3, 2, 2, tp=tp)
    shared = _heads(3, 1, 2, tp=tp)
    return [
        plain(aten.scaled_dot_product_attention.default)(tp, leaf(1, 3, 2, 2, **few), key, _heads(3, 2, 1, **few)),
        plain(aten.scaled_dot_product_attention.default)(tp, query, key, key, mask),
        plain(aten.scaled_dot_product_attention.default, enable_gqa=True)(tp, _heads(6, 2, 2, tp=tp), shared, shared),
    ]


def _heads(heads: int, length: int, size: int, tp: int, short: bool = False) -> Leaf:
    """``(1, heads, length, size)``, of which ranks hold heads."""
    made = leaf(1, heads, length, size, tp=tp)
    rest = [(tuple(range(n)),) * tp for n in (length, size)]
    held = [Operand((((0,),) * tp, h, *rest), g) for h in menu(heads, tp, short) for g in ("complete", "partial")]
    return Leaf(made.value, held)


def flexible_attentions(tp: int) -> list[Case]:
    """Whose functions see the head that they are at, or do not; of one mask for all heads, or one for each."""

    def attends(score: Any, mask: Any, masks: int, *operands: Leaf) -> Case:
        """An attention with a block mask of so many heads, whose tensors all ranks hold."""
        (*blocks, _) = create_block_mask(mask, None, masks, 2, 2, device="cpu", BLOCK_SIZE=2).as_tuple()
        whole = [Leaf(x, numbers(x, tp).operands[:1]) for x in blocks if isinstance(x, torch.Tensor)]

        def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
            query, key, value, *rest = nodes
            tensors, allowed = iter(rest), function(graph, "allowed", mask)
            sparse = (*(next(tensors) if isinstance(x, torch.Tensor) else x for x in blocks), allowed)
            scores = function(graph, "scores", score)
            return graph.call_function(flex_attention_outputs, (query, key, value, scores, sparse, 0.5, {}, (), ()))

        return Case(call, (*operands, *whole), tp)

    def anywhere(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score + (i - j) * 0.3

    def by_head(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score + (i - j) * (h + 1)

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i >= j

    def diagonal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i + h >= j

    few = [_heads(n, 2, 2, tp=tp, short=True) for n in (2, 4)]
    own, shared = (few[0], few[0], few[0]), (few[1], few[0], few[0])
    return [
        attends(anywhere, causal, 1, *own),
        attends(anywhere, causal, 1, *shared),
        attends(by_head, causal, 1, *own),
        attends(anywhere, diagonal, 2, *own),
        attends(anywhere, causal, 2, *own),
    ]


def grouped_products(tp: int) -> list[Case]:
    """A matrix for each run of rows."""
    ends = Leaf(torch.tensor([1, 4], dtype=torch.int32), numbers(torch.tensor([1, 4]), tp, short=True).operands)
    rows, matrices = leaf(4, 3, tp=tp, short=True), leaf(2, 3, 2, tp=tp, short=True)
    return [plain(torch.ops.transformers.grouped_mm_fallback.default)(tp, rows, matrices, ends)]


def convolutions(tp: int) -> list[Case]:
    short: dict[str, Any] = {"tp": tp, "short": True}

    def groups(chosen: tuple[Operand, ...]) -> Iterator[Call]:
        held = [len(each) for each in chosen[1].held[0]]
        for count in {per_rank(held), 3}:
            yield calling(aten.conv1d.default, HERE, HERE, None, [1], [1], [1], count)

    return [
        plain(aten.conv1d.default)(tp, leaf(1, 3, 5, **short), leaf(2, 3, 2, **short), leaf(2, **short)),
        Case(
            calling(aten.conv1d.default, HERE, HERE, None, [1], [1], [1], 3),
            (leaf(2, 3, 2, **short), leaf(3, 1, 2, tp=tp)), tp, groups,
        ),
        plain(aten.conv1d.default, HERE, HERE, None, [1], [0], [1], 2)(
            tp, leaf(1, 4, 3, **short), leaf(2, 2, 2, **short)
        ),
    ]  # fmt: skip


def triangular(tp: int) -> list[Case]:
    cases = []
    for left in (True, False):
        call = plain(aten.linalg_solve_triangular.default, upper=False, left=left)
        right = leaf(3, 2, 5, tp=tp, short=True) if left else leaf(3, 5, 2, tp=tp, short=True)
        cases.append(call(tp, leaf(3, 2, 2, tp=tp, short=True), right))
    return cases


# Moves -----------------------------------------------------------------------------------------------


def permutations(tp: int) -> list[Case]:
    def orders(_: Any) -> Iterator[Call]:
        for order in itertools.permutations(range(3)):
            yield calling(aten.permute.default, HERE, list(order))

    cube = leaf(2, 3, 2, tp=tp, short=True, pending=True)
    return [
        Case(calling(aten.permute.default, HERE, [2, 0, 1]), (cube,), tp, orders),
        plain(aten.transpose.int, 0, -1)(tp, leaf(3, 5, tp=tp, pending=True)),
    ]


def _factored(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All shapes of so many dims and elements."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factored(number // first, count - 1))
    if not number:
        yield (0,) * count


def views(tp: int) -> list[Case]:
    def written(dims: int) -> Callable[[tuple[Operand, ...]], Iterator[Call]]:
        def calls(chosen: tuple[Operand, ...]) -> Iterator[Call]:
            (operand,) = chosen
            each = [list(_factored(math.prod(len(held[r]) for held in operand.held), dims)) for r in range(tp)]
            for shapes in itertools.islice(itertools.product(*each), 120):
                yield calling(aten.reshape.default, HERE, [per_rank(n) for n in zip(*shapes, strict=True)])
            for open_at, shape in itertools.product(range(dims), each[0]):
                sizes = [-1 if i == open_at else n for i, n in enumerate(shape)]
                yield calling(aten.reshape.default, HERE, sizes)

        return calls

    return [
        Case(calling(aten.reshape.default, HERE, list(shape)), (_along(0, *of, tp=tp),), tp, written(len(shape)))
        for of, shape in (((6, 2), (2, 3, 2)), ((6,), (3, 2)), ((2, 3), (6,)), ((2, 3), (3, 2)), ((4, 3), (2, 6)))
    ] + [
        plain(aten.flatten.using_ints, 0, 1)(tp, leaf(2, 3, 2, tp=tp, short=True, pending=True)),
        plain(aten.unsqueeze.default, -1)(tp, leaf(2, 3, tp=tp, pending=True)),
        plain(aten.squeeze.dim, 0)(tp, leaf(1, 3, tp=tp, pending=True)),
        Case(
            calling(aten.reshape.default, HERE, [6]), (leaf(2, 3, tp=tp, pending=True),), tp, written(1)
        ),
    ]  # fmt: skip


def _along(dim: int, *shape: int, tp: int) -> Leaf:
    """An operand of which ranks hold part of one dim."""
    made = leaf(*shape, tp=tp)
    rest = [[(tuple(range(n)),) * tp] for n in shape]
    rest[dim] = menu(shape[dim], tp)
    held = [Operand(h, g) for h in itertools.product(*rest) for g in ("complete", "partial")]
    return Leaf(made.value, held)


def expands(tp: int) -> list[Case]:
    def calls(chosen: tuple[Operand, ...]) -> Iterator[Call]:
        for sizes in itertools.product(range(1, 5), repeat=tp):
            yield calling(aten.expand.default, HERE, [per_rank(sizes), -1])

    return [
        Case(calling(aten.expand.default, HERE, [3, 5]), (leaf(1, 5, tp=tp),), tp, calls),
        Case(calling(aten.expand.default, HERE, [3, -1]), (leaf(2, tp=tp),), tp, calls),
    ]


def _bounds(size: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(size + 1) for b in range(a, size + 1)]


def parts(tp: int) -> list[Case]:
    def slices(chosen: tuple[Operand, ...]) -> Iterator[Call]:
        for each in (
            itertools.product(_bounds(3), repeat=tp) if tp == 2 else ((b, b, c) for b in _bounds(3) for c in _bounds(2))
        ):
            starts, ends = (per_rank(x) for x in zip(*each, strict=True))
            yield calling(aten.slice.Tensor, HERE, 0, starts, ends)
        yield calling(aten.slice.Tensor, HERE, 0, 0, 3, 2)
        yield from (calling(aten.slice.Tensor, HERE, dim, 1, 3) for dim in (1, -2, -1))

    def selects(chosen: tuple[Operand, ...]) -> Iterator[Call]:
        for each in itertools.product(range(3), repeat=tp):
            yield calling(aten.select.int, HERE, 0, per_rank(each))

    return [
        Case(calling(aten.slice.Tensor, HERE, 0, *bounds), (_along(0, 3, tp=tp),), tp, slices)
        for bounds in ((1, 3), (0, 2), (0, 3, 2))
    ] + [
        Case(calling(aten.select.int, HERE, 0, 1), (leaf(3, 2, tp=tp, short=tp == 3),), tp, selects),
        plain(aten.flip.default, HERE, [0])(tp, leaf(5, tp=tp)),
        plain(aten.narrow.default, HERE, 0, 1, 2)(tp, leaf(4, tp=tp)),
    ]  # fmt: skip


def own_parts(tp: int) -> list[Case]:
    """``narrow`` and ``take``: what follows is joined again, as nothing is a result that is no value of the model."""

    def narrowed(chosen: tuple[Operand, ...]) -> Iterator[Call]:
        for each in itertools.product(_bounds(3), repeat=tp):
            if all(b > a for a, b in each):
                yield calling(ops.narrow, HERE, 0, per_rank([(run,) for run in each]))
        yield calling(ops.narrow, HERE, 0, per_rank([((0, 1), (2, 3))] * tp))
        yield from (calling(ops.narrow, HERE, dim, ((0, 3),)) for dim in (2, -3, -2))

    def taken(chosen: tuple[Operand, ...]) -> Iterator[Call]:
        ways = [(0,), (1,), (0, 1), (1, 0), (0, 0), (0, 2), ()]
        for each in itertools.product(ways, repeat=tp):
            yield calling(ops.take, HERE, 0, per_rank(each))
        yield from (calling(ops.take, HERE, dim, (0, 1, 2)) for dim in (1, -2, -1))

    def nothing(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return nodes[0]

    return [
        Case(nothing, (_along(0, 3, 2, tp=tp),), tp, narrowed),
        Case(nothing, (leaf(3, tp=tp),), tp, taken),
    ]


def windows(tp: int) -> list[Case]:
    return [
        plain(aten.unfold.default, HERE, 0, 2, 1)(tp, leaf(5, 2, tp=tp)),
        plain(aten.unfold.default, HERE, -1, 3, 2)(tp, leaf(2, 5, tp=tp)),
    ]


def joins(tp: int) -> list[Case]:
    short: dict[str, Any] = {"tp": tp, "short": True}
    return [
        plain(aten.cat.default, REST, 0)(tp, leaf(2, 3, **short), leaf(3, 3, **short)),
        plain(aten.cat.default, REST, 0)(tp, leaf(2, tp=tp), leaf(3, tp=tp)),
        plain(aten.cat.default, REST, 0)(tp, leaf(2, **short), leaf(1, **short), leaf(3, **short)),
    ]


# Reductions, norms, look-ups -----------------------------------------------------------------------------


def totals(tp: int) -> list[Case]:
    def counted(chosen: tuple[Operand, ...]) -> Iterator[Call]:
        for times in itertools.product((0.0, 0.5, 1.0), repeat=tp):

            def call(graph: fx.Graph, nodes: list[fx.Node], times: Any = times) -> fx.Node:
                total = graph.call_function(aten.sum.dim_IntList, (nodes[0], [-1]))
                return graph.call_function(aten.mul.Tensor, (total, per_rank(times)))

            yield call

    return [
        plain(aten.sum.dim_IntList, HERE, [1])(tp, leaf(2, 5, tp=tp)),
        plain(aten.sum.dim_IntList, HERE, [0], True)(tp, leaf(5, 2, tp=tp)),
        plain(aten.sum.default)(tp, leaf(2, 3, tp=tp)),
        plain(aten.mean.dim, HERE, [-1])(tp, leaf(2, 5, tp=tp)),
        Case(calling(aten.sum.dim_IntList, HERE, [-1]), (leaf(2, 3, tp=tp, short=tp == 3),), tp, counted),
    ]


def mixings(tp: int) -> list[Case]:
    return [
        plain(aten.softmax.int, -1)(tp, leaf(3, 5, tp=tp)),
        plain(aten.log_softmax.int, 0)(tp, leaf(3, 5, tp=tp)),
        plain(aten.cumsum.default, 1)(tp, leaf(2, 5, tp=tp)),
        plain(aten.tril.default)(tp, leaf(2, 3, 3, tp=tp, short=True)),
        plain(aten.amax.default, HERE, [1])(tp, leaf(2, 5, tp=tp)),
        plain(aten.var.dim, HERE, [0])(tp, leaf(3, 5, tp=tp, short=True)),
        plain(aten.logsumexp.default, HERE, [0], True)(tp, leaf(3, 5, tp=tp)),
        plain(aten.argmax.default, HERE, 1)(tp, leaf(2, 5, tp=tp)),
        plain(aten.constant_pad_nd.default, HERE, [1, 0], 0.0)(tp, leaf(3, 5, tp=tp)),
        plain(aten.roll.default, HERE, [1], [0])(tp, leaf(3, 5, tp=tp)),
    ]


def norms(tp: int) -> list[Case]:
    short: dict[str, Any] = {"tp": tp, "short": True}
    return [
        plain(aten.layer_norm.default, HERE, [5], HERE, HERE)(
            tp, leaf(2, 5, **short), leaf(5, **short), leaf(5, **short)
        ),
        plain(aten.rms_norm.default, HERE, [5], HERE, 1e-5)(tp, leaf(2, 5, tp=tp), leaf(5, tp=tp)),
        plain(aten.rms_norm.default, HERE, [3, 5])(tp, leaf(2, 3, 5, **short)),
    ]


def look_ups(tp: int) -> list[Case]:
    ids = torch.tensor([[1, 0, 4], [2, 2, 3]])
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 4])

    def indexed(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return graph.call_function(aten.index.Tensor, (nodes[0], [None, nodes[1], nodes[2]]))

    def apart(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return graph.call_function(aten.index.Tensor, (nodes[0], [nodes[1], None, nodes[2]]))

    return [
        plain(aten.embedding.default)(tp, leaf(5, 3, tp=tp), numbers(ids, tp, short=True)),
        plain(aten.index_select.default, HERE, 0, HERE)(tp, leaf(5, 2, tp=tp), numbers(columns, tp, short=True)),
        Case(
            indexed,
            (leaf(3, 2, 5, tp=tp, short=True), numbers(rows, tp, short=True), numbers(columns, tp, short=True)),
            tp,
        ),
        Case(
            apart,
            (leaf(2, 3, 5, tp=tp, short=True), numbers(rows, tp, short=True), numbers(columns, tp, short=True)),
            tp,
        ),
    ]


def writings(tp: int) -> list[Case]:
    short: dict[str, Any] = {"tp": tp, "short": True}
    rows = numbers(torch.tensor([2, 0]), tp, short=True)

    def put(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return graph.call_function(aten.index_put.default, (nodes[0], [None, nodes[1]], nodes[2]))

    def copied(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return graph.call_function(aten.index_copy.default, (nodes[0], 0, nodes[1], nodes[2]))

    def sliced(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return graph.call_function(aten.slice_scatter.default, (nodes[0], nodes[1], 1, 1, 3))

    return [
        Case(put, (leaf(2, 3, 3, **short), rows, leaf(2, 2, 3, **short)), tp),
        Case(put, (leaf(1, 3, 4, **short), rows, leaf(2, 4, **short)), tp),  # an assignment leaves out dims of one
        Case(put, (leaf(2, 3, 3, **short), rows, leaf(2, 1, 3, **short)), tp),
        Case(copied, (leaf(3, 4, tp=tp), rows, leaf(2, 4, tp=tp)), tp),
        Case(sliced, (leaf(3, 3, 2, **short), leaf(3, 2, 2, **short)), tp),
    ]


def complex_numbers(tp: int) -> list[Case]:
    def turned(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        left, right = (graph.call_function(aten.view_as_complex.default, (n,)) for n in nodes)
        return graph.call_function(aten.view_as_real.default, (graph.call_function(aten.mul.Tensor, (left, right)),))

    return [Case(turned, (leaf(3, 2, 2, tp=tp, short=True), leaf(2, 2, tp=tp)), tp)]


RULES: dict[str, Cases] = {
    each.__name__: each
    for each in (
        pointwise, sums, matrices, parallel_products, attentions, flexible_attentions, grouped_products,
        convolutions, triangular, permutations, views, expands, parts, own_parts, windows, joins, totals, mixings,
        norms, look_ups, writings, complex_numbers,
    )
}  # fmt: skip


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_claims_is_so(rule: str, tp: int) -> None:
    assert_sound(RULES[rule](tp))
