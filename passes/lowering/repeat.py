"""repeat: make layers that differ in their weights only calls of one region, which a compiler compiles once.

Repetition is found in the graph: runs of nodes that call the same functions on values of the same shapes, with the same
connections. A run reads results of the run before, values that all runs share, and its own weights; all of them are
arguments of the region. No name of a module is read.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from passes import ops
from passes.lowering.local_values import call, local
from passes.lowering.merge import split_gradient, unmerge
from passes.ops.registry import COLLECTIVES

__all__ = ["repeat"]

_MIN_NODES = 10
"""The fewest nodes of a run that is worth a region."""
_MAX_TRIALS = 16
"""The number of distances between equal nodes that are tried, and of starts of the first run."""

_Run = list[fx.Node]

aten = torch.ops.aten


def _key(argument: Any, node_key: Callable[[fx.Node], Any]) -> Any:
    """A key of an argument, equal for equal arguments only; ``node_key`` gives that of a node."""
    if isinstance(argument, fx.Node):
        return node_key(argument)
    if isinstance(argument, (tuple, list)):
        return type(argument), tuple(_key(a, node_key) for a in argument)
    if isinstance(argument, dict):
        return dict, tuple((k, _key(v, node_key)) for k, v in argument.items())
    if isinstance(argument, slice):
        return slice, *(_key(a, node_key) for a in (argument.start, argument.stop, argument.step))
    return type(argument), argument.hex() if isinstance(argument, float) else argument  # -0.0 is not 0.0


def _form(nodes: Sequence[fx.Node], wired: bool = True) -> tuple[Any, list[fx.Node]]:
    """The form of a run, which is equal for runs that one region can replace, and the nodes outside that the run reads.

    Args:
        nodes: the run.
        wired: whether the form says which nodes are read and which sizes are equal, or only of what kind they are.

    Returns:
        The form, and the nodes outside in the order of the region's inputs.
    """
    own = {n: i for i, n in enumerate(nodes)}
    outside: dict[fx.Node, int] = {}
    names: dict[str, int] = {}

    def value(node: fx.Node) -> Any:
        if (known := node.meta.get("local")) is None:
            return None
        numbered = (
            n if isinstance(n, int) else re.sub(r"[a-z]\w*", lambda s: f"n{names.setdefault(s[0], len(names))}", n)
            for n in known.shape
        )
        return known.dtype, *(numbered if wired else (n if isinstance(n, int) else "" for n in known.shape))

    def node_key(node: fx.Node) -> Any:
        if node in own:
            return own[node]
        return "outside", outside.setdefault(node, len(outside)) if wired else 0, value(node)

    form = [(n.target, _key(n.args, node_key), _key(n.kwargs, node_key), value(n)) for n in nodes]
    return tuple(form), list(outside)


def _may_repeat(node: fx.Node, regions: Collection[str]) -> bool:
    """Whether a node may be in a region: a call that changes nothing in place, on tensors and sizes."""
    if node.op != "call_function" or any(n.op == "get_attr" and n.target in regions for n in node.all_input_nodes):
        return False
    return not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


def _find_stretches(tokens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The stretches in which each node equals the one a fixed distance before it: start, stop and distance.

    The longest comes first.
    """
    last: dict[int, int] = {}
    votes: Counter[int] = Counter()
    for i, token in enumerate(tokens):
        if token in last and i - last[token] >= _MIN_NODES:
            votes[i - last[token]] += 1
        last[token] = i
    stretches = []
    for distance, _ in votes.most_common(_MAX_TRIALS):
        start = 0
        for i in range(len(tokens) - distance + 1):
            if i + distance == len(tokens) or tokens[i] != tokens[i + distance]:
                if i > start:
                    stretches.append((start, i + distance, distance))
                start = i + 1
    yield from sorted(stretches, key=lambda s: (s[0] - s[1], s[2]))


_ALIASING = (
    operator.getitem,
    split_gradient,
    ops.enter,
    ops.enter_overlapping,
    ops.deduplicate_gradient,
    ops.broadcast_from_first,
    aten.dropout.default,
)
"""The functions that may return their operand or a view of it, besides the ops of torch whose schema says so."""


def _memory_owner(node: fx.Node) -> fx.Node:
    """The node whose memory a node's value may be in."""
    while node.op == "call_function" and node.args:
        source = node.args[0]
        if node.target is operator.getitem and source.target is ops.enter:  # one of several that enter together
            source = source.args[0][node.args[1]]
        returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
        if not isinstance(source, fx.Node) or not (node.target in _ALIASING or (returns and returns[0].alias_info)):
            break
        node = source
    return node


def _outputs(nodes: Sequence[fx.Node]) -> set[int]:
    """The positions in a run of the nodes that nodes outside read."""
    own = set(nodes)
    return {i for i, n in enumerate(nodes) if any(u not in own for u in n.users)}


def _share_no_memory(runs: Sequence[_Run]) -> bool:
    """Whether no two inputs or outputs of a run may share memory, as a compiler demands."""
    outputs = sorted(set[int]().union(*map(_outputs, runs)))
    for run in runs:
        bases = [_memory_owner(n) for n in (*_form(run)[1], *(run[i] for i in outputs))]
        if len(set(bases)) < len(bases):
            return False
    return True


def _previous_run(
    run: _Run, nodes: Sequence[fx.Node], tokens: dict[fx.Node, int], start: int, missing: int
) -> _Run | None:
    """The run before a stretch, which has other nodes between its first nodes; None if there is none.

    The first layer computes values that all layers share, such as a view of a table, between its own nodes.

    Args:
        run: the first run of the stretch.
        nodes: all nodes.
        tokens: a number for each node, equal for nodes of one form.
        start: the position from which on the previous run has no other nodes in it.
        missing: the number of nodes of the previous run before that position.
    """
    previous = list(nodes[start : start + len(run) - missing])
    position = start
    for node in reversed(run[:missing]):
        position -= 1
        while position >= 0 and tokens[nodes[position]] != tokens[node]:
            position -= 1
        if position < 0:
            return None
        previous.insert(0, nodes[position])
    return previous if _form(previous)[0] == _form(run)[0] else None


def _can_be_one_call(run: _Run) -> bool:
    """Whether a run can be one call: no other node between its own is a collective, or reads its values."""
    own, node = set(run), run[0]
    while node is not run[-1]:
        if node not in own and (node.target in COLLECTIVES or not own.isdisjoint(node.all_input_nodes)):
            return False
        node = node.next
    return True


def _count_live_values(nodes: Sequence[fx.Node], order: dict[fx.Node, int], distance: int) -> list[int]:
    """For each position in the graph the number of values that live across it, made at most ``distance`` before it."""
    changes = [0] * (len(nodes) + 2)
    for i, node in enumerate(nodes):
        last = max((order[u] for u in node.users if u.op != "output"), default=i)
        changes[i + 1] += 1
        changes[min(last, i + distance) + 1] -= 1
    return list(accumulate(changes))


def _find_runs(
    nodes: Sequence[fx.Node], tokens: dict[fx.Node, int], start: int, stop: int, distance: int
) -> list[_Run]:
    """The runs of a stretch, divided where the fewest values live; of several such divisions the one with most runs."""
    order = {n: i for i, n in enumerate(nodes)}
    live = _count_live_values(nodes, order, distance)
    count = (stop - start) // distance
    firsts = sorted(range(start, stop - count * distance + 1), key=lambda i: live[i + distance])
    best: list[_Run] = []
    for first in firsts[:_MAX_TRIALS]:
        if best and live[order[best[-1][-1]] + 1] < live[first + distance]:
            break
        runs = [list(nodes[i : i + distance]) for i in range(first, first + count * distance, distance)]
        if first - start < distance:
            previous = _previous_run(runs[0], nodes, tokens, start, distance - (first - start))
            runs = [previous, *runs] if previous is not None and _can_be_one_call(previous) else runs
        forms = [_form(r)[0] for r in runs]
        usual, _ = Counter(forms).most_common(1)[0]
        runs = [r for r, form in zip(runs, forms, strict=True) if form == usual]
        if len(runs) > max(1, len(best)) and _share_no_memory(runs):
            best = runs
    return best


def _copy_single_heads(attention: fx.Node) -> None:
    """Copy operands of attention that have one head and are slices of a larger value.

    For such a slice Inductor (torch 2.13) saves the wrong memory for a region's backward, and the gradients come out as
    whatever is in it.
    """
    for operand in attention.args[:3]:
        if _memory_owner(operand) is not operand and local(operand).shape[-3] == 1:
            copy = call(attention, aten.clone.default, (operand,), like=operand, shape=local(operand).shape)
            attention.replace_input_with(operand, copy)


def _make_region(run: _Run, outputs: Sequence[int]) -> fx.Graph:
    """A run as a separate graph: its inputs are the nodes outside that it reads, its results the nodes ``outputs``."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in _form(run)[1]:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {k: v for k, v in node.meta.items() if k != "weights"}
    for node in run:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.target is aten.scaled_dot_product_attention.default:
            _copy_single_heads(copies[node])
    graph.output(tuple(copies[run[i]] for i in outputs)).meta["local"] = None
    return graph


def _call_region(graph: fx.Graph, name: str, run: _Run, outputs: Sequence[int]) -> None:
    """Call a region in place of a run."""
    with graph.inserting_before(run[-1].next):
        region = graph.call_module(name, tuple(_form(run)[1]))
        region.meta = {"local": None, "module": run[0].meta.get("module")}
        for k, i in enumerate(outputs):
            result = graph.call_function(operator.getitem, (region, k))
            result.meta = dict(run[i].meta)
            run[i].replace_all_uses_with(result)
    for node in reversed(run):
        graph.erase_node(node)


def repeat(graph: fx.Graph, regions: Collection[str], repeated: dict[str, fx.Graph]) -> int:
    """Make one region of equal runs of nodes, and call it in their place.

    Args:
        graph: a rank's graph; changed in place.
        regions: the submodules that the graph calls, by ``get_attr`` target.
        repeated: gets the new regions, by the target of the ``call_module`` nodes that call them.

    Returns:
        The number of nodes that were saved.
    """
    unmerge(graph)
    before = len(graph.nodes)
    while (runs := _largest_runs(graph, regions)) is not None:
        name = f"repeated_{len(repeated)}"
        outputs = sorted(set[int]().union(*map(_outputs, runs)))
        repeated[name] = _make_region(runs[0], outputs)
        for run in runs:
            _call_region(graph, name, run, outputs)
    return before - len(graph.nodes)


def _add_equal_runs(runs: list[_Run], nodes: Sequence[fx.Node], tokens: dict[fx.Node, int]) -> list[_Run]:
    """The runs, and equal ones elsewhere in the graph, in the graph's order."""
    form, _ = _form(runs[0])
    pattern, taken = [tokens[n] for n in runs[0]], {n for run in runs for n in run}
    by_first, position = {run[0]: run for run in runs}, 0
    while position <= len(nodes) - len(pattern):
        window = nodes[position : position + len(pattern)]
        if [tokens[n] for n in window] == pattern and taken.isdisjoint(window) and _form(window)[0] == form:
            by_first[window[0]] = list(window)
            position += len(pattern)
        else:
            position += 1
    return [by_first[n] for n in nodes if n in by_first]


def _largest_runs(graph: fx.Graph, regions: Collection[str]) -> list[_Run] | None:
    """The runs of the longest stretch that has any; None if no stretch has."""
    nodes, numbers = list(graph.nodes), dict[Any, int]()
    kinds = [_form([n], wired=False)[0] if _may_repeat(n, regions) else n for n in nodes]
    tokens = {n: numbers.setdefault(kind, len(numbers)) for n, kind in zip(nodes, kinds, strict=True)}
    for stretch in _find_stretches(list(tokens.values())):
        if runs := _find_runs(nodes, tokens, *stretch):
            all_runs = _add_equal_runs(runs, nodes, tokens)
            return all_runs if _share_no_memory(all_runs) else runs
    return None
