"""fuse_adjacent: what is done alike to adjacent parts of a value is done once, to all of them.

Queries, keys and values are parts of one product after :func:`merge`, and each is viewed as heads and transposed;
queries and keys are both rotated. Such parts are adjacent along one dim, and an op that computes each of its indices
by itself gives of the parts together what it gives of each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import Size, call, cut, is_tensor, local, numel, remove_dead_code, replace

__all__ = ["fuse_adjacent"]

aten = torch.ops.aten

_POINTWISE = {"aten.add", "aten.sub", "aten.mul", "aten.div", "aten.neg", "aten.to", "aten._to_copy", "aten.silu",
              "aten.gelu", "aten.relu", "aten.tanh", "aten.sigmoid", "aten.exp", "aten.clone"}  # fmt: skip
_ON_LAST = {"aten.rms_norm", "aten.layer_norm"}


@dataclass(frozen=True)
class Part:
    """A value as a part of another: its indices from ``start`` to ``stop`` of one dim."""

    base: fx.Node
    dim: int
    start: int
    stop: int


def part_of(node: Any) -> Part | None:
    """What a node that cuts out a part, at places that are the same in every call, cuts out of what."""
    if not is_tensor(node) or node.target is not aten.slice.Tensor:
        return None
    base, dim, start, stop, step = cut(node)
    size = local(base).shape[dim]
    if step != 1 or not isinstance(size, int) or not all(isinstance(n, (int, type(None))) for n in (start, stop)):
        return None
    start, stop, _ = slice(start, stop).indices(size)
    return Part(base, dim, start, stop)


def _leads_to(node: fx.Node, part: Part) -> int | None:
    """The dim of a node's result along which it computes each index from the same index of a part; None for none."""
    name, rank = op_name(node), len(local(part.base).shape)
    dim = part.dim
    if name in _POINTWISE:
        return dim + len(local(node).shape) - rank
    if name in _ON_LAST:
        return dim if dim < rank - len(node.args[1]) else None
    if name == "aten.slice" or name == "aten.unsqueeze":
        other = node.args[1] % len(local(node).shape)
        if name == "aten.slice":  # the outer dim first, so that two cuts do not change places for ever
            return dim if other > dim else None
        return dim + (other <= dim)
    if name == "aten.transpose":
        swapped = {node.args[1] % rank: node.args[2] % rank, node.args[2] % rank: node.args[1] % rank}
        return swapped.get(dim, dim)
    if name == "aten.permute":
        return [d % rank for d in node.args[1]].index(dim)
    if name == "aten.cat":
        other = (node.args[1] if len(node.args) > 1 else 0) % rank
        return dim if other != dim else None
    if name == "aten.reshape":
        return _split(local(node.args[0]).shape, local(node).shape, dim)
    return None


def _split(before: tuple[Size, ...], after: tuple[Size, ...], dim: int) -> int | None:
    """The outer dim of what a reshape makes of its last one, if that is ``dim`` and all others stay."""
    if dim != len(before) - 1 or len(after) != len(before) + 1 or before[:-1] != after[:-2]:
        return None
    return dim if numel(after[-2:]) == before[-1] else None


def _inner(node: fx.Node) -> int:
    """How many indices of the part make up one of the result: more than one for a reshape that splits them."""
    if op_name(node) != "aten.reshape":
        return 1
    inner = local(node).shape[-1]
    assert isinstance(inner, int)
    return inner


def _signature(node: fx.Node, parts: dict[fx.Node, Part]) -> tuple[Any, Part, int] | None:
    """What nodes that do alike to parts have in common; a part that this one is of, and the result's dim."""
    found: list[Part] = []

    def key(argument: Any) -> Any:
        if isinstance(argument, fx.Node) and argument in parts:
            found.append(parts[argument])
            return "part", argument.meta["local"].dtype, parts[argument].base, parts[argument].dim
        if isinstance(argument, (list, tuple)):
            return tuple(key(a) for a in argument)
        return type(argument), argument

    args = node.args[:1] if op_name(node) == "aten.reshape" else node.args  # its sizes are made anew
    try:
        signature = node.target, key(args), tuple((k, key(v)) for k, v in node.kwargs.items())
        hash(signature)
    except TypeError:
        return None
    if not found or any((p.dim, p.start, p.stop) != (found[0].dim, found[0].start, found[0].stop) for p in found):
        return None
    ranks = {len(local(p.base).shape) for p in found}
    dim = _leads_to(node, found[0]) if len(ranks) == 1 else None
    if dim is None or not _others_broadcast(node, parts, dim) or found[0].start % _inner(node):
        return None
    rest = local(node).shape
    return (signature, rest[:dim], rest[dim + 1 :], local(node).dtype), found[0], dim


def _others_broadcast(node: fx.Node, parts: dict[fx.Node, Part], dim: int) -> bool:
    """Whether what else a node reads is the same for all indices of a dim of its result."""
    if op_name(node) not in _POINTWISE:
        return all(not is_tensor(n) or n in parts or op_name(node) in _ON_LAST for n in node.all_input_nodes)
    from_right = len(local(node).shape) - dim
    others = [n for n in node.all_input_nodes if is_tensor(n) and n not in parts]
    return all(len(local(n).shape) < from_right or local(n).shape[-from_right] == 1 for n in others)


def _runs(members: list[tuple[Part, fx.Node]]) -> list[list[tuple[Part, fx.Node]]]:
    """Nodes on parts, one after another, that lie side by side."""
    runs: list[list[tuple[Part, fx.Node]]] = []
    for part, node in sorted(members, key=lambda m: m[0].start):
        if runs and runs[-1][-1][0].stop == part.start:
            runs[-1].append((part, node))
        else:
            runs.append([(part, node)])
    return [run for run in runs if len(run) > 1]


class _Round:
    """One look at all parts of a graph.

    Attributes:
        count: how many nodes were saved.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.count = graph, 0
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.parts = {node: part for node in graph.nodes if (part := part_of(node)) is not None}

    def merge(self) -> None:
        """Do together what is done alike."""
        alike: dict[Any, list[tuple[Part, fx.Node]]] = defaultdict(list)
        dims: dict[fx.Node, int] = {}
        for node in self.graph.nodes:
            if (
                node.op != "call_function"
                or not is_tensor(node)
                or not any(n in self.parts for n in node.all_input_nodes)
            ):
                continue
            if (found := _signature(node, self.parts)) is not None:
                signature, part, dims[node] = found
                alike[signature].append((part, node))
        touched: set[fx.Node] = set()
        for members in alike.values():
            for run in _runs(members):
                nodes = [n for _, n in run]
                if not any(n in touched or touched & set(n.all_input_nodes) for n in nodes):
                    self._merged(run, dims[nodes[0]])
                    touched |= set(nodes)
                    self.count += len(nodes) - 1

    def _merged(self, run: list[tuple[Part, fx.Node]], dim: int) -> None:
        start, stop = run[0][0].start, run[-1][0].stop
        nodes = [n for _, n in run]
        first = min(nodes, key=self.order.__getitem__)

        def whole(argument: Any) -> Any:
            if not isinstance(argument, fx.Node) or argument not in self.parts:
                return argument
            part = self.parts[argument]
            shape = local(part.base).shape
            if (start, stop) == (0, shape[part.dim]):
                return part.base
            held = (*shape[: part.dim], stop - start, *shape[part.dim + 1 :])
            return call(first, aten.slice.Tensor, (part.base, part.dim, start, stop), like=argument, shape=held)

        args, kwargs = fx.map_arg((first.args, dict(first.kwargs)), whole)
        inner, shape = _inner(first), local(first).shape
        wide = (*shape[:dim], (stop - start) // inner, *shape[dim + 1 :])
        if op_name(first) == "aten.reshape":
            sizes = list(args[1])
            sizes[dim] = wide[dim]
            args = (args[0], sizes)
        joined = call(first, first.target, args, kwargs, like=first, shape=wide)
        made = []
        for part, node in run:
            places = (part.start - start) // inner, (part.stop - start) // inner
            cut = (joined, dim, *places)
            made.append(
                call(first, aten.slice.Tensor, cut, like=node, shape=local(node).shape, name=f"{node.name}_part")
            )
        for (_, node), new in zip(run, made, strict=True):
            replace(node, new)


def fuse_adjacent(graph: fx.Graph) -> int:
    """Do once what is done alike to adjacent parts of a value.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        How many nodes were saved.
    """
    count = 0
    while True:
        step = _Round(graph)
        step.merge()
        if not step.count:
            return count
        count += step.count
        _unnested(graph)
        remove_dead_code(graph)


def _unnested(graph: fx.Graph) -> None:
    """Cut parts of parts out of the whole."""
    for node in graph.nodes:
        outer = part_of(node)
        inner = part_of(outer.base) if outer is not None else None
        if outer is not None and inner is not None and outer.dim == inner.dim:
            node.args = (inner.base, inner.dim, inner.start + outer.start, inner.start + outer.stop)
