"""conversion: a rewritten graph under construction, and the conversions of values from one layout to another.

There are three conversions: ``narrow`` (replicated to split), ``all_gather`` (split to replicated) and ``all_reduce``
(partial sum to replicated). Each is inserted once per value and layout.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from passes import ops
from passes.graphs import module_path, op_name, source_line
from passes.layouts.axes import Axes, common_refinement
from passes.layouts.facts import Facts
from passes.layouts.layout import WHOLE, Layout, Shards
from passes.layouts.relayout import flattened, relayout
from passes.layouts.sharded_value import GROUP, PerRank, ShardedValue, varies
from passes.layouts.units import Value

__all__ = ["Conversion", "readable"]

aten = torch.ops.aten


class SplitDim(NamedTuple):
    """A dim that a layout splits.

    Where only one factor of the dim is split, and not all factors are static, the dim is unflattened before it is
    narrowed or gathered, and flattened afterwards.

    Attributes:
        dim: the dim.
        sizes: the sizes to unflatten it to, -1 for a symbolic one; empty where it is not unflattened.
        position: the position of the split factor among ``sizes``.
        shards: the index set of each rank, along the split factor or else along the dim.
    """

    dim: int
    sizes: list[int]
    position: int
    shards: Shards


class Conversion:
    """A rewritten graph under construction, and the rewritten value of each captured one.

    Args:
        facts: the facts from :func:`passes.propagate` about the captured graph.
        layouts: each captured value's planned layout, on its own virtual dims.
        tp: the number of ranks.

    Attributes:
        graph: the rewritten graph.
        states: per captured node the rewritten value that stands for it.
        origin: the captured node that is being rewritten; emitted calls take their name, module path and source line
            from it.
    """

    def __init__(self, facts: Facts, layouts: dict[fx.Node, Layout], tp: int) -> None:
        self.facts, self.layouts, self.tp = facts, layouts, tp
        self.group = GROUP
        self.graph = fx.Graph()
        self.states: dict[fx.Node, ShardedValue] = {}
        self._converted: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self.origin: fx.Node | None = None

    def value(self, node: fx.Node) -> Value:
        """The labelled value of a captured tensor node."""
        return self.facts.values[node]

    def layout(self, node: fx.Node) -> Layout:
        """The planned layout of a captured value, on its own virtual dims."""
        return self.layouts.get(node, WHOLE)

    def _refine(self, node: fx.Node, axes: Axes) -> bool:
        """Restate a value's axes and its layouts on finer factors; returns False if ``axes`` are not finer."""
        value, state = self.value(node), self.states[node]
        if any(common_refinement(a, b) != b for a, b in zip(value.axes, axes, strict=True)):
            return False
        current = relayout(state.layout, value.axes, axes, self.tp)
        planned = relayout(self.layout(node), value.axes, axes, self.tp)
        if current is None or planned is None:
            return False
        self.facts.values[node] = value.refined(axes)
        state.layout, self.layouts[node] = current, planned
        self._converted = {key: n for key, n in self._converted.items() if key[0] is not node}
        return True

    def replicated(self, node: fx.Node) -> fx.Node:
        """The rewritten node that holds a captured value on every rank."""
        return self.local(node, WHOLE)

    def local(self, node: fx.Node, layout: Layout) -> fx.Node:
        """The rewritten node that holds a captured value in the given layout; inserts the conversions it needs."""
        state = self.states[node]
        if state.pending:
            state = self._reduce(node)
        if state.layout == layout:
            return state.node
        if (node, layout) not in self._converted:
            value = self.value(node)
            if not (state.layout.whole or layout.whole or self._contains(state.layout, layout)):
                state = ShardedValue(self.local(node, WHOLE))
            if state.layout.whole and layout.whole:
                converted = state.node
            elif layout.whole:
                converted = self._gather(node, state.node, value, state.layout)
            else:
                converted = self._narrow(node, state.node, value, state.layout, layout)
            self._converted[node, layout] = converted
        return self._converted[node, layout]

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        state: str,
        layout: Layout = WHOLE,
        value: Value | None = None,
        name: str | None = None,
        shaped: bool = True,
    ) -> fx.Node:
        """Add a call on rewritten nodes.

        Args:
            target: the function to call.
            args: its arguments.
            kwargs: its keyword arguments.
            state: ``whole`` for a replicated result, ``split`` for shards, ``pending`` for a partial sum.
            layout: the result's layout.
            value: the labelled value that the call computes.
            name: the node's name; left out, it is made from the module path and the op.
            shaped: whether the result has the shape of ``value`` in ``layout``.
        """
        origin = self.origin
        assert origin is not None
        node = self.graph.create_node("call_function", target, args, kwargs or {}, name or readable(origin))
        self.describe(node, origin, state, layout, value)
        node.meta["shaped"] = shaped
        return node

    def size(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a computation on sizes."""
        node = self.call(target, args, state="size", name="size")
        node.meta |= {"grad": False, "global": None}
        return node

    def extent(self, node: fx.Node, dim: int) -> fx.Node:
        """The global size of a dim, computed from the size of the rank's shard."""
        state = self.states[node]
        total, counts = self._split_sizes(node, dim, state.layout)
        size = self.size(aten.sym_size.int, state.node, dim)
        if total > 1:
            size = self.size(operator.floordiv, size, PerRank.of(counts))
            size = self.size(operator.mul, size, total)
        return size

    def _split_sizes(self, node: fx.Node, dim: int, layout: Layout) -> tuple[int, list[int]]:
        """The global size of a dim's split factors, and each rank's local size of them; 1 if none is split."""
        shards = [layout.dims[v] for v in self.value(node).virtual(dim) if v in layout.dims]
        return math.prod(s.size for s in shards), [math.prod(s.counts[r] for s in shards) for r in range(self.tp)]

    # Conversions ------------------------------------------------------------------------------

    def _reduce(self, node: fx.Node) -> ShardedValue:
        """Reduce a partial sum, and add its addend once."""
        state = self.states[node]
        origin, self.origin = self.origin, node
        value = self.value(node)
        name = f"{state.node.name}_all_reduce"
        total = self.call(ops.all_reduce, (state.node, GROUP), state="whole", value=value, name=name)
        if state.addend is not None:
            total = self.call(aten.add.Tensor, (total, state.addend), state="whole", value=value)
        self.origin = origin
        self.states[node] = ShardedValue(total)
        return self.states[node]

    @staticmethod
    def _contains(layout: Layout, wanted: Layout) -> bool:
        """Whether each rank's shard in one layout contains its shard in another, so that narrowing suffices."""
        dims, wanted_dims = layout.dims, wanted.dims
        return all(d in wanted_dims and shards.contains(wanted_dims[d]) for d, shards in dims.items())

    def split_dims(self, value: Value, layout: Layout) -> list[SplitDim] | None:
        """The dims that a layout on virtual dims splits; None where one of them cannot be unflattened."""
        split_dims: list[SplitDim] = []
        dims = layout.dims
        for dim, sizes in enumerate(value.axes):
            factors = [dims.get(v) for v in value.virtual(dim)]
            if all(s is None for s in factors):
                continue
            if all(s.static for s in sizes):
                flat = flattened(sizes, factors, self.tp)
                assert flat is not None
                split_dims.append(SplitDim(dim, [], 0, flat))
            else:
                split = [i for i, s in enumerate(factors) if s is not None]
                symbolic = [i for i, s in enumerate(sizes) if not s.static]
                if len(split) != 1 or len(symbolic) != 1:
                    return None
                shards = factors[split[0]]
                assert shards is not None
                numbers = [-1 if i in symbolic else s.number for i, s in enumerate(sizes)]
                split_dims.append(SplitDim(dim, numbers, split[0], shards))
        return split_dims

    def _narrow(self, node: fx.Node, source: fx.Node, value: Value, layout: Layout, wanted: Layout) -> fx.Node:
        """Take each rank's shard in a wanted layout from a node that has the value in a layout that contains it."""
        origin, self.origin = self.origin, node
        split_dims = self.split_dims(value, wanted)
        current = {d.dim: d.shards for d in self.split_dims(value, layout) or []}
        assert split_dims is not None, (node, value.axes)
        result = source
        args: tuple[Any, ...]
        for left, (dim, sizes, position, shards) in zip(reversed(range(len(split_dims))), split_dims, strict=True):
            have = current.get(dim)
            runs = [
                (have.ranks[r].positions(shards.ranks[r]) if have else shards.ranks[r]).runs for r in range(self.tp)
            ]
            if sizes:
                result = self.call(aten.unflatten.int, (result, dim, sizes), state="whole", value=value, shaped=False)
            args, shaped = (result, dim + position, PerRank.of(runs)), not (left or sizes)
            result = self.call(ops.narrow, args, state="split", layout=wanted, value=value, shaped=shaped)
            if sizes:
                args = (result, dim, dim + len(sizes) - 1)
                target = aten.flatten.using_ints
                result = self.call(target, args, state="split", layout=wanted, value=value, shaped=not left)
        self.origin = origin
        return result

    def _gather(self, node: fx.Node, source: fx.Node, value: Value, layout: Layout) -> fx.Node:
        """Gather the ranks' shards into the replicated value."""
        origin, self.origin = self.origin, node
        split_dims = self.split_dims(value, layout)
        assert split_dims is not None, (node, value.axes)
        result, places = source, []
        shift = 0
        args: tuple[Any, ...]
        for dim, sizes, position, shards in split_dims:
            split = dim + shift
            if sizes:
                counts = [PerRank.of(list(shards.counts)) if i == position else n for i, n in enumerate(sizes)]
                args = (result, split, counts)
                result = self.call(aten.unflatten.int, args, state="split", layout=layout, value=value, shaped=False)
                shift += len(sizes) - 1
                split += position
            places.append((split, tuple(s.runs for s in shards.ranks)))
        name = f"{source.name}_all_gather"
        args = (result, tuple(places), GROUP)
        result = self.call(ops.all_gather, args, state="whole", value=value, name=name, shaped=not shift)
        for dim, sizes, _, _ in split_dims:
            if sizes:
                args = (result, dim, dim + len(sizes) - 1)
                shift -= len(sizes) - 1
                result = self.call(aten.flatten.using_ints, args, state="whole", value=value, shaped=not shift)
        self.origin = origin
        return result

    def describe(self, new: fx.Node, origin: fx.Node, state: str, layout: Layout, value: Value | None) -> None:
        """Set the meta of a rewritten node: its captured origin, state and layout."""
        if state == "whole" and any(varies(n) for n in new.all_input_nodes):
            state = "split"  # from shards that hold all of it: equal on all ranks, but its gradient is a partial sum
        new.meta = {
            "origin": origin.name,
            "module": module_path(origin),
            "source": source_line(origin),
            "grad": origin.meta.get("grad", False),
            "global": origin.meta.get("val"),
            "state": state,
            "layout": layout,
            "axes": value.axes if value is not None else (),
        }
        if "nn_module_stack" in origin.meta:
            new.meta["nn_module_stack"] = origin.meta["nn_module_stack"]


def readable(node: fx.Node) -> str:
    """A node's readable name, from its module path and op: ``layers_0_self_attn_q_proj``, ``layers_0_add``."""
    path = module_path(node).replace(".", "_")
    name = op_name(node)
    short = name.removeprefix("aten.") if name else node.name
    if short in ("linear", "addmm", "embedding", "layer_norm") and path:
        return path
    return f"{path}_{short}" if path else short
