"""conversion: a rewritten graph under construction, and what brings a value from one layout into another.

Three conversions there are: ``narrow`` (whole to split), ``all_gather`` (split to whole), ``all_reduce`` (pending
sum to whole). Each is made once per value and layout.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

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


class Conversion:
    """A rewritten graph under construction, and where each captured value stands in it.

    Args:
        facts: what :func:`passes.propagate` found out about the captured graph.
        layouts: each captured value's planned layout, on its own virtual dims.
        tp: the number of ranks.
    """

    def __init__(self, facts: Facts, layouts: dict[fx.Node, Layout], tp: int) -> None:
        self.facts, self.layouts, self.tp = facts, layouts, tp
        self.group = GROUP
        self.graph = fx.Graph()
        self.states: dict[fx.Node, ShardedValue] = {}
        self._converted: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self._current: fx.Node | None = None

    def value(self, node: fx.Node) -> Value:
        """The labelled value of a captured tensor node."""
        return self.facts.values[node]

    def layout(self, node: fx.Node) -> Layout:
        """The layout that the plan gives a captured value (on its own virtual dims)."""
        return self.layouts.get(node, WHOLE)

    def _refine(self, node: fx.Node, axes: Axes) -> bool:
        """State a value's axes, and all layouts given of it, on finer factors; False if these are not finer."""
        value, state = self.value(node), self.states[node]
        if any(common_refinement(a, b) != b for a, b in zip(value.axes, axes, strict=True)):
            return False
        have = relayout(state.layout, value.axes, axes, self.tp)
        planned = relayout(self.layout(node), value.axes, axes, self.tp)
        if have is None or planned is None:
            return False
        self.facts.values[node] = value.refined(axes)
        state.layout, self.layouts[node] = have, planned
        self._converted = {key: n for key, n in self._converted.items() if key[0] is not node}
        return True

    def whole(self, node: fx.Node) -> fx.Node:
        """A node's value, whole on every rank."""
        return self.local(node, WHOLE)

    def local(self, node: fx.Node, layout: Layout) -> fx.Node:
        """A node's value in the given layout; conversions are inserted as needed."""
        state = self.states[node]
        if state.pending:
            state = self._resolve(node)
        if state.layout == layout:
            return state.node
        if (node, layout) not in self._converted:
            have, value = state, self.value(node)
            if not (have.layout.whole or layout.whole or self._contains(have.layout, layout)):
                have = ShardedValue(self.local(node, WHOLE))
            if have.layout.whole and layout.whole:
                converted = have.node
            elif layout.whole:
                converted = self._gather(node, have.node, value, have.layout)
            else:
                converted = self._narrow(node, have.node, value, have.layout, layout)
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
        """Add a call on rewritten nodes; ``state`` is ``whole``, ``split`` or ``pending``.

        ``shaped`` is false for one whose result has not the shape of ``value`` in ``layout``.
        """
        origin = self._current
        assert origin is not None
        node = self.graph.create_node("call_function", target, args, kwargs or {}, name or readable(origin))
        self._describe(node, origin, state, layout, value)
        node.meta["shaped"] = shaped
        return node

    def size(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a computation on sizes."""
        node = self.call(target, args, state="size", name="size")
        node.meta |= {"grad": False, "global": None}
        return node

    def extent(self, node: fx.Node, dim: int) -> fx.Node:
        """The size of a dim of the whole value, from that of the part at hand."""
        state = self.states[node]
        whole, local = self._split_of(node, dim, state.layout)
        size = self.size(aten.sym_size.int, state.node, dim)
        if whole > 1:
            size = self.size(operator.floordiv, size, PerRank.of(local))
            size = self.size(operator.mul, size, whole)
        return size

    def _split_of(self, node: fx.Node, dim: int, layout: Layout) -> tuple[int, list[int]]:
        """The size of the split factors of a dim, and the size that each rank holds of them; 1 if it is whole."""
        shards = [layout.dims[v] for v in self.value(node).virtual(dim) if v in layout.dims]
        return math.prod(s.size for s in shards), [math.prod(s.counts[r] for s in shards) for r in range(self.tp)]

    # Conversions ------------------------------------------------------------------------------

    def _resolve(self, node: fx.Node) -> ShardedValue:
        state = self.states[node]
        origin, self._current = self._current, node
        value = self.value(node)
        name = f"{state.node.name}_all_reduce"
        reduced = self.call(ops.all_reduce, (state.node, GROUP), state="whole", value=value, name=name)
        if state.addend is not None:
            reduced = self.call(aten.add.Tensor, (reduced, state.addend), state="whole", value=value)
        self._current = origin
        self.states[node] = ShardedValue(reduced)
        return self.states[node]

    @staticmethod
    def _contains(have: Layout, want: Layout) -> bool:
        mine, other = have.dims, want.dims
        return all(d in other and s.contains(other[d]) for d, s in mine.items())

    def _parts(self, value: Value, layout: Layout) -> list[tuple[int, list[int], int, Shards]] | None:
        """A layout by dim: ``(dim, sizes to unflatten it to or [], which of them is split, shards)``."""
        found: list[tuple[int, list[int], int, Shards]] = []
        dims = layout.dims
        for dim, sizes in enumerate(value.axes):
            own = [dims.get(v) for v in value.virtual(dim)]
            if all(s is None for s in own):
                continue
            if all(s.static for s in sizes):
                flat = flattened(sizes, own, self.tp)
                assert flat is not None
                found.append((dim, [], 0, flat))
            else:
                split = [i for i, s in enumerate(own) if s is not None]
                symbolic = [i for i, s in enumerate(sizes) if not s.static]
                if len(split) != 1 or len(symbolic) != 1:
                    return None
                shards = own[split[0]]
                assert shards is not None
                found.append((dim, [-1 if i in symbolic else s.number for i, s in enumerate(sizes)], split[0], shards))
        return found

    def _narrow(self, node: fx.Node, source: fx.Node, value: Value, have: Layout, want: Layout) -> fx.Node:
        origin, self._current = self._current, node
        parts, now = self._parts(value, want), {d: s for d, _, _, s in self._parts(value, have) or []}
        assert parts is not None, (node, value.axes)
        result = source
        for left, (dim, unflat, position, shards) in zip(reversed(range(len(parts))), parts, strict=True):
            held = now.get(dim)
            runs = [
                (held.ranks[r].positions(shards.ranks[r]) if held else shards.ranks[r]).runs for r in range(self.tp)
            ]
            inside = dim + position
            if unflat:
                result = self.call(aten.unflatten.int, (result, dim, unflat), state="whole", value=value, shaped=False)
            given, shaped = (result, inside, PerRank.of(runs)), not (left or unflat)
            result = self.call(ops.narrow, given, state="split", layout=want, value=value, shaped=shaped)
            if unflat:
                given = (result, dim, dim + len(unflat) - 1)
                target = aten.flatten.using_ints
                result = self.call(target, given, state="split", layout=want, value=value, shaped=not left)
        self._current = origin
        return result

    def _gather(self, node: fx.Node, source: fx.Node, value: Value, have: Layout) -> fx.Node:
        origin, self._current = self._current, node
        parts = self._parts(value, have)
        assert parts is not None, (node, value.axes)
        result, places = source, []
        shift = 0
        given: tuple[Any, ...]
        for dim, unflat, position, shards in parts:
            inside = dim + shift
            if unflat:
                local = [PerRank.of(list(shards.counts)) if i == position else n for i, n in enumerate(unflat)]
                given = (result, inside, local)
                result = self.call(aten.unflatten.int, given, state="split", layout=have, value=value, shaped=False)
                shift += len(unflat) - 1
                inside += position
            places.append((inside, tuple(s.runs for s in shards.ranks)))
        name = f"{source.name}_all_gather"
        given = (result, tuple(places), GROUP)
        result = self.call(ops.all_gather, given, state="whole", value=value, name=name, shaped=not shift)
        for dim, unflat, _, _ in parts:
            if unflat:
                given = (result, dim, dim + len(unflat) - 1)
                shift -= len(unflat) - 1
                result = self.call(aten.flatten.using_ints, given, state="whole", value=value, shaped=not shift)
        self._current = origin
        return result

    def _describe(self, new: fx.Node, origin: fx.Node, state: str, layout: Layout, value: Value | None) -> None:
        if state == "whole" and any(varies(n) for n in new.all_input_nodes):
            state = "split"  # made of shards that hold all of it: equal on all ranks, but its gradient is in parts
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
    """A node name from the module path and the op: ``layers_0_self_attn_q_proj``, ``layers_0_add``."""
    path = module_path(node).replace(".", "_")
    name = op_name(node)
    short = name.removeprefix("aten.") if name else node.name
    if short in ("linear", "addmm", "embedding", "layer_norm") and path:
        return path
    return f"{path}_{short}" if path else short
