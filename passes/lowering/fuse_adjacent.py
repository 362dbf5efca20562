"""fuse_adjacent: make one op of equal ops on adjacent slices of a value.

Queries, keys and values are slices of one product after :func:`merge`. Each is viewed as heads and transposed; queries
and keys are both rotated. Such slices are adjacent along one dim, and an op that treats the indices of this dim
separately can be applied to all slices at once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import Size, call, is_tensor, local, numel, remove_dead_code, replace, slice_arguments

__all__ = ["fuse_adjacent"]

aten = torch.ops.aten

_POINTWISE = {"aten.add", "aten.sub", "aten.mul", "aten.div", "aten.neg", "aten.to", "aten._to_copy", "aten.silu",
              "aten.gelu", "aten.relu", "aten.tanh", "aten.sigmoid", "aten.exp", "aten.clone"}  # fmt: skip
_ON_LAST = {"aten.rms_norm", "aten.layer_norm"}


@dataclass(frozen=True)
class Slice:
    """A slice of a value: its indices from ``start`` to ``stop`` along one dim."""

    base: fx.Node
    dim: int
    start: int
    stop: int


def slice_of(node: Any) -> Slice | None:
    """The source and static range of a slice node; None if it is dynamic, or no slice."""
    if not is_tensor(node) or node.target is not aten.slice.Tensor:
        return None
    base, dim, start, stop, step = slice_arguments(node)
    size = local(base).shape[dim]
    if step != 1 or not isinstance(size, int) or not all(isinstance(n, (int, type(None))) for n in (start, stop)):
        return None
    start, stop, _ = slice(start, stop).indices(size)
    return Slice(base, dim, start, stop)


def _result_dim(node: fx.Node, part: Slice) -> int | None:
    """The dim of a node's result in which each index depends on the same index of the slice only; None if none does."""
    name, rank = op_name(node), len(local(part.base).shape)
    dim = part.dim
    if name in _POINTWISE:
        return dim + len(local(node).shape) - rank
    if name in _ON_LAST:
        return dim if dim < rank - len(node.args[1]) else None
    if name == "aten.slice" or name == "aten.unsqueeze":
        other = node.args[1] % len(local(node).shape)
        if name == "aten.slice":  # the outer dim first, or two slices would change places for ever
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
        return _split_dim(local(node.args[0]).shape, local(node).shape, dim)
    return None


def _split_dim(before: tuple[Size, ...], after: tuple[Size, ...], dim: int) -> int | None:
    """The outer of the two dims that a reshape makes of its last one, if that is ``dim`` and all others stay."""
    if dim != len(before) - 1 or len(after) != len(before) + 1 or before[:-1] != after[:-2]:
        return None
    return dim if numel(after[-2:]) == before[-1] else None


def _inner_size(node: fx.Node) -> int:
    """The number of the slice's indices in one of the result's: more than one for a reshape that splits the dim."""
    if op_name(node) != "aten.reshape":
        return 1
    inner = local(node).shape[-1]
    assert isinstance(inner, int)
    return inner


def _signature(node: fx.Node, parts: dict[fx.Node, Slice]) -> tuple[Any, Slice, int] | None:
    """The signature of a node that reads slices; None if it cannot be fused.

    Returns:
        The signature, which is equal for nodes that can be fused, a slice that the node reads, and the result's dim.
    """
    slices: list[Slice] = []

    def key(argument: Any) -> Any:
        if isinstance(argument, fx.Node) and argument in parts:
            slices.append(parts[argument])
            return "part", argument.meta["local"].dtype, parts[argument].base, parts[argument].dim
        if isinstance(argument, (list, tuple)):
            return tuple(key(a) for a in argument)
        return type(argument), argument

    args = node.args[:1] if op_name(node) == "aten.reshape" else node.args  # its sizes are computed anew
    try:
        signature = node.target, key(args), tuple((k, key(v)) for k, v in node.kwargs.items())
        hash(signature)
    except TypeError:
        return None
    first = slices[0] if slices else None
    if first is None or any((s.dim, s.start, s.stop) != (first.dim, first.start, first.stop) for s in slices):
        return None
    ranks = {len(local(s.base).shape) for s in slices}
    dim = _result_dim(node, first) if len(ranks) == 1 else None
    if dim is None or not _others_broadcast(node, parts, dim) or first.start % _inner_size(node):
        return None
    shape = local(node).shape
    return (signature, shape[:dim], shape[dim + 1 :], local(node).dtype), first, dim


def _others_broadcast(node: fx.Node, parts: dict[fx.Node, Slice], dim: int) -> bool:
    """Whether a node's other operands are the same for all indices of a dim of its result."""
    if op_name(node) not in _POINTWISE:
        return all(not is_tensor(n) or n in parts or op_name(node) in _ON_LAST for n in node.all_input_nodes)
    from_right = len(local(node).shape) - dim
    others = [n for n in node.all_input_nodes if is_tensor(n) and n not in parts]
    return all(len(local(n).shape) < from_right or local(n).shape[-from_right] == 1 for n in others)


def _adjacent_runs(members: list[tuple[Slice, fx.Node]]) -> list[list[tuple[Slice, fx.Node]]]:
    """The runs of nodes whose slices are adjacent, in their order; runs of one are left out."""
    runs: list[list[tuple[Slice, fx.Node]]] = []
    for part, node in sorted(members, key=lambda m: m[0].start):
        if runs and runs[-1][-1][0].stop == part.start:
            runs[-1].append((part, node))
        else:
            runs.append([(part, node)])
    return [run for run in runs if len(run) > 1]


class _Round:
    """One search for fusions in a graph.

    Attributes:
        graph: the graph; changed in place.
        count: the number of nodes that were saved.
        order: the position of each node.
        parts: the slices in the graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.count = graph, 0
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.parts = {node: part for node in graph.nodes if (part := slice_of(node)) is not None}

    def merge(self) -> None:
        """Fuse the nodes that have one signature and read adjacent slices."""
        groups: dict[Any, list[tuple[Slice, fx.Node]]] = defaultdict(list)
        dims: dict[fx.Node, int] = {}
        for node in self.graph.nodes:
            if (
                node.op != "call_function"
                or not is_tensor(node)
                or not any(n in self.parts for n in node.all_input_nodes)
            ):
                continue
            if (match := _signature(node, self.parts)) is not None:
                signature, part, dims[node] = match
                groups[signature].append((part, node))
        touched: set[fx.Node] = set()
        for members in groups.values():
            for run in _adjacent_runs(members):
                nodes = [n for _, n in run]
                if not any(n in touched or touched & set(n.all_input_nodes) for n in nodes):
                    self._merge_run(run, dims[nodes[0]])
                    touched |= set(nodes)
                    self.count += len(nodes) - 1

    def _merge_run(self, run: list[tuple[Slice, fx.Node]], dim: int) -> None:
        """Make one op of a run of nodes, and slices of its result in their place."""
        start, stop = run[0][0].start, run[-1][0].stop
        nodes = [n for _, n in run]
        first = min(nodes, key=self.order.__getitem__)

        def joint(argument: Any) -> Any:
            if not isinstance(argument, fx.Node) or argument not in self.parts:
                return argument
            part = self.parts[argument]
            shape = local(part.base).shape
            if (start, stop) == (0, shape[part.dim]):
                return part.base
            wide = (*shape[: part.dim], stop - start, *shape[part.dim + 1 :])
            return call(first, aten.slice.Tensor, (part.base, part.dim, start, stop), like=argument, shape=wide)

        args, kwargs = fx.map_arg((first.args, dict(first.kwargs)), joint)
        inner, shape = _inner_size(first), local(first).shape
        wide = (*shape[:dim], (stop - start) // inner, *shape[dim + 1 :])
        if op_name(first) == "aten.reshape":
            sizes = list(args[1])
            sizes[dim] = wide[dim]
            args = (args[0], sizes)
        result = call(first, first.target, args, kwargs, like=first, shape=wide)
        slices = []
        for part, node in run:
            bounds = (result, dim, (part.start - start) // inner, (part.stop - start) // inner)
            slices.append(
                call(first, aten.slice.Tensor, bounds, like=node, shape=local(node).shape, name=f"{node.name}_part")
            )
        for (_, node), new in zip(run, slices, strict=True):
            replace(node, new)


def fuse_adjacent(graph: fx.Graph) -> int:
    """Make one op of equal ops on adjacent slices of a value.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        The number of nodes that were saved.
    """
    count = 0
    while True:
        step = _Round(graph)
        step.merge()
        if not step.count:
            return count
        count += step.count
        _flatten_slices(graph)
        remove_dead_code(graph)


def _flatten_slices(graph: fx.Graph) -> None:
    """Take slices of slices from the first value."""
    for node in graph.nodes:
        outer = slice_of(node)
        inner = slice_of(outer.base) if outer is not None else None
        if outer is not None and inner is not None and outer.dim == inner.dim:
            node.args = (inner.base, inner.dim, inner.start + outer.start, inner.start + outer.stop)
