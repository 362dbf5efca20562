"""repeat: layers that do the same on other weights become calls of one region, which a compiler compiles once.

What repeats is found in the graph: runs of nodes that call the same on values of the same shapes, wired alike. A run
reads what the run before made, what all runs share, and weights of its own; to the region all of them are arguments.
No name of a module is read.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from passes import ops
from passes.lowering.local_values import call, local
from passes.lowering.merge import apart, joined
from passes.ops.registry import COLLECTIVES

__all__ = ["repeat"]

_FEWEST = 10
"""Runs of fewer nodes are not worth a region."""
_TRIED = 16
"""How many distances between equal nodes are tried."""

_Run = list[fx.Node]

aten = torch.ops.aten


def _key(argument: Any, place: Any) -> Any:
    """An argument, so that equal keys mean the same; a node is what ``place`` makes of it."""
    if isinstance(argument, fx.Node):
        return place(argument)
    if isinstance(argument, (tuple, list)):
        return type(argument), tuple(_key(a, place) for a in argument)
    if isinstance(argument, dict):
        return dict, tuple((k, _key(v, place)) for k, v in argument.items())
    if isinstance(argument, slice):
        return slice, *(_key(a, place) for a in (argument.start, argument.stop, argument.step))
    return type(argument), argument.hex() if isinstance(argument, float) else argument  # -0.0 is not 0.0


def _form(nodes: Sequence[fx.Node], wired: bool = True) -> tuple[Any, list[fx.Node]]:
    """What runs have in common that one region can stand for, and what a run reads from outside, in the region's order.

    Args:
        nodes: the run.
        wired: whether it counts which nodes are read and which sizes are equal, or only of what kind they are.
    """
    own = {n: i for i, n in enumerate(nodes)}
    given: dict[fx.Node, int] = {}
    names: dict[str, int] = {}

    def value(node: fx.Node) -> Any:
        if (known := node.meta.get("local")) is None:
            return None
        numbered = (
            n if isinstance(n, int) else re.sub(r"[a-z]\w*", lambda s: f"n{names.setdefault(s[0], len(names))}", n)
            for n in known.shape
        )
        return known.dtype, *(numbered if wired else (n if isinstance(n, int) else "" for n in known.shape))

    def place(node: fx.Node) -> Any:
        if node in own:
            return own[node]
        return "given", given.setdefault(node, len(given)) if wired else 0, value(node)

    form = [(n.target, _key(n.args, place), _key(n.kwargs, place), value(n)) for n in nodes]
    return tuple(form), list(given)


def _may_repeat(node: fx.Node, regions: Collection[str]) -> bool:
    """Whether a region may have a node: a call that changes nothing, on tensors and sizes."""
    if node.op != "call_function" or any(n.op == "get_attr" and n.target in regions for n in node.all_input_nodes):
        return False
    return not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


def _stretches(tokens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Where each node is like the one a fixed distance before it: start, stop and distance; the longest first."""
    last: dict[int, int] = {}
    votes: Counter[int] = Counter()
    for i, token in enumerate(tokens):
        if token in last and i - last[token] >= _FEWEST:
            votes[i - last[token]] += 1
        last[token] = i
    found = []
    for distance, _ in votes.most_common(_TRIED):
        start = 0
        for i in range(len(tokens) - distance + 1):
            if i + distance == len(tokens) or tokens[i] != tokens[i + distance]:
                if i > start:
                    found.append((start, i + distance, distance))
                start = i + 1
    yield from sorted(found, key=lambda f: (f[0] - f[1], f[2]))


_SAME = (
    operator.getitem,
    joined,
    ops.enter,
    ops.enter_overlapping,
    ops.deduplicate_gradient,
    ops.broadcast_from_first,
    aten.dropout.default,
)
"""What may give back its operand, or a view of it, beside the ops of torch that say so."""


def _base(node: fx.Node) -> fx.Node:
    """The value in whose memory a node's value may lie."""
    while node.op == "call_function" and node.args:
        source = node.args[0]
        if node.target is operator.getitem and source.target is ops.enter:  # of several that enter together
            source = source.args[0][node.args[1]]
        returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
        if not isinstance(source, fx.Node) or not (node.target in _SAME or (returns and returns[0].alias_info)):
            break
        node = source
    return node


def _read_outside(nodes: Sequence[fx.Node]) -> set[int]:
    """Which nodes of a run others read."""
    own = set(nodes)
    return {i for i, n in enumerate(nodes) if any(u not in own for u in n.users)}


def _lie_apart(runs: Sequence[_Run]) -> bool:
    """Whether no two values that go into a run, or come out of it, may share memory: a compiler wants that."""
    made = sorted(set[int]().union(*map(_read_outside, runs)))
    for run in runs:
        bases = [_base(n) for n in (*_form(run)[1], *(run[i] for i in made))]
        if len(set(bases)) < len(bases):
            return False
    return True


def _before(run: _Run, nodes: Sequence[fx.Node], tokens: dict[fx.Node, int], after: int, missing: int) -> _Run | None:
    """The run before one, where other nodes lie between its own.

    Layers share what the first of them makes, such as a view of a table; that lies between the first one's nodes.

    Args:
        run: a run.
        nodes: all nodes.
        tokens: what they have in common.
        after: where those of the run before are from which on no other lies between them.
        missing: how many come before these.
    """
    found = list(nodes[after : after + len(run) - missing])
    at = after
    for node in reversed(run[:missing]):
        at -= 1
        while at >= 0 and tokens[nodes[at]] != tokens[node]:
            at -= 1
        if at < 0:
            return None
        found.insert(0, nodes[at])
    return found if _form(found)[0] == _form(run)[0] else None


def _is_one(run: _Run) -> bool:
    """Whether a run can be one call: no node between its own meets ranks or reads of it."""
    own, node = set(run), run[0]
    while node is not run[-1]:
        if node not in own and (node.target in COLLECTIVES or not own.isdisjoint(node.all_input_nodes)):
            return False
        node = node.next
    return True


def _passing(nodes: Sequence[fx.Node], order: dict[fx.Node, int], distance: int) -> list[int]:
    """For each place in the graph how many values pass it that are made no further than ``distance`` before it."""
    changes = [0] * (len(nodes) + 2)
    for i, node in enumerate(nodes):
        last = max((order[u] for u in node.users if u.op != "output"), default=i)
        changes[i + 1] += 1
        changes[min(last, i + distance) + 1] -= 1
    return list(accumulate(changes))


def _runs(nodes: Sequence[fx.Node], tokens: dict[fx.Node, int], start: int, stop: int, distance: int) -> list[_Run]:
    """The runs of a stretch: cut where the fewest values pass, and then so that they are the most."""
    order = {n: i for i, n in enumerate(nodes)}
    passing = _passing(nodes, order, distance)
    count = (stop - start) // distance
    firsts = sorted(range(start, stop - count * distance + 1), key=lambda i: passing[i + distance])
    best: list[_Run] = []
    for first in firsts[:_TRIED]:
        if best and passing[order[best[-1][-1]] + 1] < passing[first + distance]:
            break
        runs = [list(nodes[i : i + distance]) for i in range(first, first + count * distance, distance)]
        if first - start < distance:
            more = _before(runs[0], nodes, tokens, start, distance - (first - start))
            runs = [more, *runs] if more is not None and _is_one(more) else runs
        forms = [_form(r)[0] for r in runs]
        usual, _ = Counter(forms).most_common(1)[0]
        runs = [r for r, form in zip(runs, forms, strict=True) if form == usual]
        if len(runs) > max(1, len(best)) and _lie_apart(runs):
            best = runs
    return best


def _own_heads(attention: fx.Node) -> None:
    """Let what attention has of one head be no part of a larger value.

    Of such a part Inductor (torch 2.13) saves another place in memory for a region's backward, and its gradients are
    whatever lies there.
    """
    for operand in attention.args[:3]:
        if _base(operand) is not operand and local(operand).shape[-3] == 1:
            own = call(attention, aten.clone.default, (operand,), like=operand, shape=local(operand).shape)
            attention.replace_input_with(operand, own)


def _region(run: _Run, made: Sequence[int]) -> fx.Graph:
    """A run as a graph by itself: its inputs are what it reads from outside, its results its nodes ``made``."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in _form(run)[1]:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {k: v for k, v in node.meta.items() if k != "weights"}
    for node in run:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.target is aten.scaled_dot_product_attention.default:
            _own_heads(copies[node])
    graph.output(tuple(copies[run[i]] for i in made)).meta["local"] = None
    return graph


def _called(graph: fx.Graph, name: str, run: _Run, made: Sequence[int]) -> None:
    """Call a region in place of a run."""
    before = run[-1].next
    with graph.inserting_before(before):
        called = graph.call_module(name, tuple(_form(run)[1]))
        called.meta = {"local": None, "module": run[0].meta.get("module")}
        for k, i in enumerate(made):
            part = graph.call_function(operator.getitem, (called, k))
            part.meta = dict(run[i].meta)
            run[i].replace_all_uses_with(part)
    for node in reversed(run):
        graph.erase_node(node)


def repeat(graph: fx.Graph, regions: Collection[str], repeated: dict[str, fx.Graph]) -> int:
    """Make one region of runs of nodes that are alike, and call it in their place.

    Args:
        graph: a rank's graph; changed in place.
        regions: the submodules that it calls, by ``get_attr`` target.
        repeated: gets the regions, by the target of the ``call_module`` nodes that call them.

    Returns:
        How many nodes are gone.
    """
    apart(graph)
    before = len(graph.nodes)
    while (runs := _found(graph, regions)) is not None:
        name = f"repeated_{len(repeated)}"
        made = sorted(set[int]().union(*map(_read_outside, runs)))
        repeated[name] = _region(runs[0], made)
        for run in runs:
            _called(graph, name, run, made)
    return before - len(graph.nodes)


def _elsewhere(runs: list[_Run], nodes: Sequence[fx.Node], tokens: dict[fx.Node, int]) -> list[_Run]:
    """Runs, and what is like them elsewhere."""
    form, _ = _form(runs[0])
    pattern, taken = [tokens[n] for n in runs[0]], {n for run in runs for n in run}
    found, at = {run[0]: run for run in runs}, 0
    while at <= len(nodes) - len(pattern):
        more = nodes[at : at + len(pattern)]
        if [tokens[n] for n in more] == pattern and taken.isdisjoint(more) and _form(more)[0] == form:
            found[more[0]] = list(more)
            at += len(pattern)
        else:
            at += 1
    return [found[n] for n in nodes if n in found]


def _found(graph: fx.Graph, regions: Collection[str]) -> list[_Run] | None:
    """The runs that have the most nodes."""
    nodes, known = list(graph.nodes), dict[Any, int]()
    kinds = [_form([n], wired=False)[0] if _may_repeat(n, regions) else n for n in nodes]
    tokens = {n: known.setdefault(kind, len(known)) for n, kind in zip(nodes, kinds, strict=True)}
    for stretch in _stretches(list(tokens.values())):
        if runs := _runs(nodes, tokens, *stretch):
            all_runs = _elsewhere(runs, nodes, tokens)
            return all_runs if _lie_apart(all_runs) else runs
    return None
