"""Ways to break a rewritten program. Each mutant has a kind, a place, and a program that is broken there alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx

from autotp.program.sharded_program import ShardedProgram
from passes import IndexSet, Layout, Shards, ops
from passes.layouts.sharded_value import GROUP, PerRank
from passes.ops.context import replica_group
from passes.ops.norms import norm_over_shards
from passes.ops.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding
from tests.verification.breakages import strip

__all__ = ["KINDS", "Mutant", "mutants"]

aten = torch.ops.aten
COLLECTIVES = (ops.all_reduce, ops.all_gather, ops.enter, ops.enter_overlapping, ops.broadcast_from_first)


@dataclass(frozen=True)
class Mutant:
    """A broken program: what was done to it, and where."""

    kind: str
    place: str
    program: ShardedProgram


def copied(program: ShardedProgram) -> tuple[ShardedProgram, dict[str, fx.Node]]:
    """A program with a graph of its own, and the nodes of that by name."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return replace(program, graph=graph), {n.name: copies[n] for n in copies}


def _edited(
    program: ShardedProgram, kind: str, node: fx.Node, edit: Callable[[fx.Graph, fx.Node], None], note: str = ""
) -> Mutant:
    broken, names = copied(program)
    edit(broken.graph, names[node.name])
    return Mutant(kind, f"{node.name}{note}", broken)


def dropped(program: ShardedProgram) -> Iterator[Mutant]:
    """A collective left out."""
    for node in program.graph.nodes:
        if node.target in COLLECTIVES:
            yield _edited(program, "drop", node, strip)


def doubled(program: ShardedProgram) -> Iterator[Mutant]:
    """A collective done twice."""

    def twice(graph: fx.Graph, node: fx.Node) -> None:
        with graph.inserting_after(node):
            again = graph.node_copy(node)
        node.replace_all_uses_with(again)
        again.args = (node, *node.args[1:])

    for node in program.graph.nodes:
        if node.target in (ops.all_reduce, ops.enter, ops.broadcast_from_first) and not isinstance(node.args[0], tuple):
            yield _edited(program, "double", node, twice)


def moved(program: ShardedProgram) -> Iterator[Mutant]:
    """A reduction before what is added to the sum, an ``enter`` behind its first reader's op."""

    def earlier(graph: fx.Graph, node: fx.Node) -> None:
        added = node.args[0]
        assert isinstance(added, fx.Node)
        for each in added.all_input_nodes[:1]:
            with graph.inserting_before(added):
                reduced = graph.call_function(ops.all_reduce, (each, GROUP))
                reduced.meta = dict(node.meta)
            added.replace_input_with(each, reduced)

    def later(graph: fx.Graph, node: fx.Node) -> None:
        (user, *_) = node.users
        (source,) = node.all_input_nodes
        user.replace_input_with(node, source)
        with graph.inserting_after(user):
            entered = graph.call_function(ops.enter, (user, node.args[1]))
            entered.meta = dict(user.meta)
        user.replace_all_uses_with(entered, delete_user_cb=lambda n: n is not entered)

    for node in program.graph.nodes:
        if node.target is ops.all_reduce and node.args[0].target is aten.add.Tensor:
            yield _edited(program, "move", node, earlier)
        if node.target is ops.enter and not isinstance(node.args[0], tuple) and node.users:
            yield _edited(program, "move", node, later)


def retyped(program: ShardedProgram) -> Iterator[Mutant]:
    """A collective replaced by one with another backward."""
    others = {
        ops.all_reduce: ops.broadcast_from_first,
        ops.enter: ops.all_reduce,
        ops.broadcast_from_first: ops.all_reduce,
    }
    for node in program.graph.nodes:
        if node.target in others and not isinstance(node.args[0], tuple):

            def other(graph: fx.Graph, node: fx.Node) -> None:
                node.target = others[node.target]

            yield _edited(program, "retype", node, other)


def regrouped(program: ShardedProgram) -> Iterator[Mutant]:
    """A collective over some of the ranks only, or over all of them instead of some."""
    halves = [list(range(program.tp))[i::2] for i in range(2)]
    for node in program.graph.nodes:
        if node.target in (ops.all_reduce, ops.enter):
            at = 1
            group = replica_group(GROUP, halves) if node.args[at] == GROUP else GROUP

            def other(graph: fx.Graph, node: fx.Node, group: str = group) -> None:
                node.args = (node.args[0], group, *node.args[2:])

            yield _edited(program, "group", node, other)


def _walk(value: Any, change: Callable[[Any], Iterator[tuple[str, Any]]]) -> Iterator[tuple[str, Any]]:
    """Each way to change one constant somewhere inside an argument."""
    yield from change(value)
    if isinstance(value, (tuple, list)) and not isinstance(value, str):
        for i, each in enumerate(value):
            for note, new in _walk(each, change):
                yield note, type(value)([*value[:i], new, *value[i + 1 :]])


def _constants(
    program: ShardedProgram, kind: str, change: Callable[[Any], Iterator[tuple[str, Any]]],
    nodes: Callable[[fx.Node], bool] = lambda n: n.op == "call_function",
) -> Iterator[Mutant]:  # fmt: skip
    for node in program.graph.nodes:
        if not nodes(node):
            continue
        for i, argument in enumerate(node.args):
            for note, new in _walk(argument, change):

                def put(graph: fx.Graph, node: fx.Node, i: int = i, old: Any = argument, new: Any = new) -> None:
                    mine = {n.name: n for n in graph.nodes}
                    mapped = fx.map_arg(new, lambda n: mine[n.name])
                    node.args = (*node.args[:i], mapped, *node.args[i + 1 :])

                yield _edited(program, kind, node, put, f" argument {i}: {note}")


def swapped(program: ShardedProgram) -> Iterator[Mutant]:
    """Two ranks with each other's constants."""

    def change(value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, PerRank):
            for a in range(program.tp - 1):
                if value.values[a] != value.values[a + 1]:
                    new = list(value.values)
                    new[a], new[a + 1] = new[a + 1], new[a]
                    yield f"ranks {a} and {a + 1} swapped", PerRank(tuple(new))

    yield from _constants(program, "swap", change)


def rotated(program: ShardedProgram) -> Iterator[Mutant]:
    """Every rank with its neighbour's constants: off by a shard."""

    def change(value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, PerRank) and program.tp > 2:
            yield "the neighbour's", PerRank((*value.values[1:], value.values[0]))

    yield from _constants(program, "off by a shard", change)


def left_global(program: ShardedProgram) -> Iterator[Mutant]:
    """A baked size that is the whole dim's on every rank."""
    views = (aten.reshape.default, aten.view.default, aten.expand.default, aten.unflatten.int)
    for node in program.graph.nodes:
        sizes = node.args[-1] if node.target in views else ()
        whole = getattr(node.meta.get("global"), "shape", ())
        for i, (size, want) in enumerate(zip(sizes, whole, strict=False)):
            if not isinstance(want, int) or size == want or isinstance(size, fx.Node) or size == -1:
                continue

            def put(graph: fx.Graph, node: fx.Node, i: int = i, want: int = want) -> None:
                sizes = list(node.args[-1])  # type: ignore[arg-type]
                node.args = (*node.args[:-1], [*sizes[:i], want, *sizes[i + 1 :]])

            yield _edited(program, "global size", node, put, f" size {i}")


def averaged(program: ShardedProgram) -> Iterator[Mutant]:
    """A reduction that takes the mean instead of the sum."""

    def mean(graph: fx.Graph, node: fx.Node) -> None:
        with graph.inserting_after(node):
            divided = graph.call_function(aten.div.Tensor, (node, float(program.tp)))
            divided.meta = dict(node.meta)
        node.replace_all_uses_with(divided, delete_user_cb=lambda n: n is not divided)

    for node in program.graph.nodes:
        if node.target is ops.all_reduce:
            yield _edited(program, "mean", node, mean)


def levelled(program: ShardedProgram) -> Iterator[Mutant]:
    """All ranks with the first one's constants."""

    def change(value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, PerRank):
            yield "the first rank's on all", value.values[0]

    yield from _constants(program, "level", change)


def off_by_one(program: ShardedProgram) -> Iterator[Mutant]:
    """A bound, an offset or a position one too high."""
    wanted = (aten.slice.Tensor, aten.select.int, ops.narrow, ops.take, vocab_parallel_embedding,
              vocab_parallel_cross_entropy, norm_over_shards)  # fmt: skip

    def change(value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 20:
            yield f"{value} + 1", value + 1
        if isinstance(value, PerRank) and all(isinstance(v, int) for v in value.values):
            yield "+ 1", PerRank(tuple(v + 1 for v in value.values))

    yield from _constants(program, "off by one", change, lambda n: n.target in wanted)


def misscaled(program: ShardedProgram) -> Iterator[Mutant]:
    """A factor or divisor that counts what a rank holds instead of everything, or the other way round."""
    wanted = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)

    def change(value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            yield f"{value} / {program.tp}", value / program.tp

    yield from _constants(program, "scale", change, lambda n: n.target in wanted)


def biased_early(program: ShardedProgram) -> Iterator[Mutant]:
    """What is added once after a reduction, added before it."""

    def early(graph: fx.Graph, node: fx.Node) -> None:
        reduced = next(n for n in node.all_input_nodes if n.target is ops.all_reduce)
        (source,) = reduced.all_input_nodes
        node.replace_input_with(reduced, source)
        with graph.inserting_after(node):
            after = graph.call_function(ops.all_reduce, (node, GROUP))
            after.meta = dict(node.meta)
        node.replace_all_uses_with(after, delete_user_cb=lambda n: n is not after)

    for node in program.graph.nodes:
        if node.target is aten.add.Tensor and any(n.target is ops.all_reduce for n in node.all_input_nodes):
            yield _edited(program, "bias early", node, early)


def _relaid(
    program: ShardedProgram, kind: str, change: Callable[[Shards], Iterator[tuple[str, Shards]]]
) -> Iterator[Mutant]:
    for name, layout in program.weight_layouts.items():
        for dim, shards in layout.shards:
            for note, new in change(shards):
                weight_layouts = dict(program.weight_layouts) | {name: Layout.of({**layout.dims, dim: new})}
                yield Mutant(kind, f"{name}: {note}", replace(program, weight_layouts=weight_layouts))


def shards_swapped(program: ShardedProgram) -> Iterator[Mutant]:
    """Two ranks with each other's share of a weight."""

    def change(shards: Shards) -> Iterator[tuple[str, Shards]]:
        for a in range(program.tp - 1):
            if shards.ranks[a] != shards.ranks[a + 1]:
                new = list(shards.ranks)
                new[a], new[a + 1] = new[a + 1], new[a]
                yield f"ranks {a} and {a + 1} swapped", Shards(shards.size, tuple(new))

    yield from _relaid(program, "shard swapped", change)


def shards_shifted(program: ShardedProgram) -> Iterator[Mutant]:
    """A weight cut one index further on."""

    def change(shards: Shards) -> Iterator[tuple[str, Shards]]:
        new = tuple(IndexSet.of((s.indices + 1) % shards.size) for s in shards.ranks)
        yield "shifted by one", Shards(shards.size, new)

    yield from _relaid(program, "shard shifted", change)


def shards_rotated(program: ShardedProgram) -> Iterator[Mutant]:
    """Every rank with its neighbour's share of a weight: heads of keys with the wrong queries, say."""

    def change(shards: Shards) -> Iterator[tuple[str, Shards]]:
        new = (*shards.ranks[1:], shards.ranks[0])
        if program.tp > 2 and new != shards.ranks:
            yield "the neighbour's", Shards(shards.size, new)

    yield from _relaid(program, "shard of the neighbour", change)


def shards_contiguous(program: ShardedProgram) -> Iterator[Mutant]:
    """A fused weight cut as if it were not."""

    def change(shards: Shards) -> Iterator[tuple[str, Shards]]:
        if shards.disjoint and any(len(s.runs) > 1 for s in shards.ranks):
            ends = np.cumsum([0, *shards.counts])
            new = tuple(IndexSet.of(np.arange(a, b)) for a, b in pairwise(ends))
            yield "contiguous", Shards(shards.size, new)

    yield from _relaid(program, "shard contiguous", change)


def shards_replicated(program: ShardedProgram) -> Iterator[Mutant]:
    """Every rank with the first one's share, where all have as much."""

    def change(shards: Shards) -> Iterator[tuple[str, Shards]]:
        if shards.disjoint and len(set(shards.counts)) == 1:
            yield "the first rank's on all", Shards(shards.size, (shards.ranks[0],) * len(shards.ranks))

    yield from _relaid(program, "shard replicated", change)


def split_apart(program: ShardedProgram) -> Iterator[Mutant]:
    """A weight with several uses (tied embeddings) of which one is split otherwise: by the neighbour's share."""
    for node in program.graph.nodes:
        layout = program.weight_layouts.get(str(node.target)) if node.op == "get_attr" else None
        if layout is None or len(layout.shards) != 1 or len(node.users) < 2:
            continue
        ((dim, shards),) = layout.shards
        runs = tuple(s.runs for s in shards.ranks)

        def apart(graph: fx.Graph, node: fx.Node, user: str, dim: int = dim, runs: Any = runs) -> None:
            (mine,) = (n for n in graph.nodes if n.name == user)
            with graph.inserting_before(mine):
                whole = graph.call_function(ops.all_gather, (node, ((dim, runs),), GROUP))
                entered = graph.call_function(ops.enter, (whole, GROUP))
                other = graph.call_function(ops.narrow, (entered, dim, PerRank((*runs[1:], runs[0]))))
            for each in (whole, entered, other):
                each.meta = dict(node.meta)
            mine.replace_input_with(node, other)

        for user in [n.name for n in node.users]:
            yield _edited(program, "one use split apart", node, partial(apart, user=user), f" in {user}")


def crossed(program: ShardedProgram) -> Iterator[Mutant]:
    """An op that reads the other of two operands of one shape."""
    for node in program.graph.nodes:
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("global"), torch.Tensor)]
        if node.op != "call_function" or node.target is operator.getitem or len(inputs) < 2:
            continue
        one, two = inputs[:2]
        if one.meta["global"].shape != two.meta["global"].shape or node.target in (aten.add.Tensor, aten.mul.Tensor):
            continue

        def cross(graph: fx.Graph, node: fx.Node, names: tuple[str, str] = (one.name, two.name)) -> None:
            mine = {n.name: n for n in graph.nodes}
            swap = {mine[names[0]]: mine[names[1]], mine[names[1]]: mine[names[0]]}
            node.args = fx.map_arg(node.args, lambda n: swap.get(n, n))

        yield _edited(program, "operands", node, cross)


KINDS: tuple[Callable[[ShardedProgram], Iterator[Mutant]], ...] = (
    dropped, doubled, moved, retyped, regrouped, averaged, swapped, rotated, levelled, left_global, off_by_one,
    misscaled, biased_early, shards_swapped, shards_rotated, shards_shifted, shards_contiguous, shards_replicated,
    split_apart, crossed,
)  # fmt: skip


def mutants(program: ShardedProgram) -> Iterator[Mutant]:
    """All mutants of a program."""
    for kind in KINDS:
        yield from kind(program)
