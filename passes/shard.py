"""shard: rewrite a captured graph so that each rank computes its part.

One walk over the graph. Each op's rule (:mod:`passes.rules`) asks the :class:`Sharder` for its inputs
in the layouts it needs and emits what stands for the op; the Sharder inserts a conversion where an
input is not in the wanted layout: ``narrow`` (whole to split), ``all_gather`` (split to whole),
``all_reduce`` (pending sum to whole). Each conversion is made once per value and layout.

A pending sum is resolved as late as it pays: sums of sums stay pending, and what is whole and only
added (a bias, a residual) waits beside it and is added once, after the reduction.

The result is one graph for all ranks in which a constant that differs between ranks is a
:class:`PerRank`; :func:`passes.localize` picks one rank's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from passes import ops
from passes.axes import Axes, common_refinement
from passes.graphs import is_random, is_tensor, module_path, op_name, source_line
from passes.layout import WHOLE, Layout, Shards
from passes.relayout import flattened, on_virtual, relayout
from passes.rules import rule_of
from passes.rules.base import Alignment, Facts, Key
from passes.state import GROUP, PerRank, State, varies
from passes.units import Value

__all__ = ["Sharder", "shard"]

aten = torch.ops.aten


class Sharder:
    """The rewritten graph under construction, and where each captured value stands in it."""

    def __init__(
        self, graph: fx.Graph, facts: Facts, layouts: dict[fx.Node, Layout], stored: dict[str, Layout], tp: int
    ) -> None:
        self.captured = graph
        self.facts = facts
        self.layouts = layouts
        self.stored = stored
        self.tp = tp
        self.group = GROUP
        self.graph = fx.Graph()
        self.states: dict[fx.Node, State] = {}
        self.gathered: list[tuple[fx.Node, str]] = []
        self._converted: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self._current: fx.Node | None = None

    # What a rule asks -------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Value:
        """The labelled value of a captured tensor node."""
        return self.facts.values[node]

    def layout(self, node: fx.Node) -> Layout:
        """The layout that the plan gives a captured value (on its own virtual dims)."""
        return self.layouts.get(node, WHOLE)

    def out_keys(self, node: fx.Node, alignment: Alignment) -> dict[Key, Shards]:
        """The plan's layout of a node's result, by key of its alignment."""
        axes, keys = alignment.out
        layout = relayout(self.layout(node), self.value(node).axes, axes, self.tp)
        return {keys[v]: s for v, s in layout.shards} if layout is not None else {}

    def operand_layout(
        self, operand: fx.Node, alignment: Alignment, index: int, keys: dict[Key, Shards]
    ) -> Layout | None:
        """The layout of an operand that matches shards given by key, on the operand's own virtual dims.

        Where those are too coarse to say it they are refined. None where even so it cannot be said.
        """
        axes, names = alignment.operands[index]
        axes = tuple(
            a if len(a) != 1 or len(b) != 1 or a[0].static or b[0].static else b  # one size in other words
            for a, b in zip(axes, self.value(operand).axes, strict=True)
        )
        layout = Layout.of({v: keys[k] for v, k in enumerate(names) if k in keys})
        found = relayout(layout, axes, self.value(operand).axes, self.tp)
        if found is None and self._refine(operand, axes):
            found = relayout(layout, axes, self.value(operand).axes, self.tp)
        return found

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

    def pending(self, node: Any) -> bool:
        """Whether a value is a pending sum that nothing but the current op reads."""
        return isinstance(node, fx.Node) and node in self.states and self.states[node].pending and len(node.users) == 1

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
                have = State(self.local(node, WHOLE))
            if have.layout.whole and layout.whole:
                converted = have.node
            elif layout.whole:
                converted = self._gather(node, have.node, value, have.layout)
            else:
                converted = self._narrow(node, have.node, value, have.layout, layout)
            self._converted[node, layout] = converted
        return self._converted[node, layout]

    # What a rule emits ------------------------------------------------------------------------

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
    ) -> fx.Node:
        """Add a call on rewritten nodes; ``state`` is ``whole``, ``split`` or ``pending``."""
        origin = self._current
        assert origin is not None
        node = self.graph.create_node("call_function", target, args, kwargs or {}, name or _readable(origin))
        self._describe(node, origin, state, layout, value)
        return node

    def size(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a computation on sizes."""
        node = self.call(target, args, state="size", name="size")
        node.meta |= {"grad": False, "global": None}
        return node

    def emit(
        self,
        node: fx.Node,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        layout: Layout = WHOLE,
        pending: bool = False,
        addend: fx.Node | None = None,
        varying: bool = False,
    ) -> None:
        """Add the call that stands for ``node``; ``varying`` if it is whole but made of shards."""
        state = "pending" if pending else "whole" if layout.whole and not varying else "split"
        new = self.call(target, args, kwargs, state=state, layout=layout, value=self.facts.values.get(node))
        self.stand(node, new, layout=layout, pending=pending, addend=addend)

    def stand(self, node: fx.Node, new: fx.Node, *, layout: Layout = WHOLE, pending: bool = False,
              addend: fx.Node | None = None) -> None:  # fmt: skip
        """Let an emitted node stand for ``node``."""
        self.states[node] = State(new, layout, pending, addend)

    def emit_take(
        self, node: fx.Node, source: fx.Node, dim: int, positions: Sequence[np.ndarray], layout: Layout
    ) -> None:
        """Emit the selection of each rank's ``positions`` along ``dim``, in their order."""
        lists = self.per_rank([tuple(int(p) for p in each) for each in positions])
        self.emit(node, ops.take, (source, dim, lists), layout=layout)

    def per_rank(self, values: Sequence[Any]) -> Any:
        """A constant that may differ between ranks."""
        return PerRank.of(values)

    def relayout(self, layout: Layout, axes: Axes, other: Axes) -> Layout | None:
        """:func:`relayout` for this number of ranks."""
        return relayout(layout, axes, other, self.tp)

    def owned(self, layout: Layout, axes: Axes) -> Layout | None:
        """The layout with every index left to one rank, as a sum over the split dims needs it.

        None where no such layout gives every rank something.
        """
        if len(layout.shards) == 1:
            ((v, shards),) = layout.shards
            return Layout.of({v: shards.owned}) if shards.owned.covers else None
        sizes = [s for dim in axes for s in dim]
        split = [v for v, _ in layout.shards]
        flat = flattened([sizes[v] for v in split], [s for _, s in layout.shards], self.tp)
        return layout if flat is not None and flat.disjoint else None

    def copy(self, node: fx.Node) -> None:
        """Stand for ``node`` by the same op on whole values."""
        for operand in node.all_input_nodes:
            if is_tensor(operand) and operand in self.states and not self.states[operand].layout.whole:
                self.gathered.append((operand, op_name(node)))
        target, args, kwargs = node.target, self.rest(node.args), self.rest(dict(node.kwargs))
        if is_random(node):
            target, args = ops.random_same, (target, *args)
        new = self.graph.create_node(node.op, target, args, kwargs, _readable(node))
        self._describe(new, node, "whole", WHOLE, self.facts.values.get(node))
        self.states[node] = State(new)

    def rest(self, args: Any) -> Any:
        """Arguments other than the tensors a rule has handled: sizes and scalars, mapped."""
        return fx.map_arg(args, self._plain)

    def local_sizes(self, node: fx.Node, sizes: Sequence[Any], first: int = 0) -> list[Any]:
        """Size arguments for the local part of ``node``'s result, from those for the whole.

        Args:
            node: the captured node whose layout counts.
            sizes: the captured arguments, for dims ``first``, ``first + 1``, ...
            first: the dim that the first argument is for.
        """
        found = []
        for dim, size in enumerate(sizes, start=first):
            whole, local = self._split_of(node, dim, self.layout(node))
            size = self.rest(size)
            if whole == 1 or (isinstance(size, int) and size == -1):
                found.append(size)
            elif isinstance(size, int):
                found.append(PerRank.of([size // whole * n for n in local]))
            else:
                each = self.size(operator.floordiv, size, whole)
                found.append(self.size(operator.mul, each, PerRank.of(local)))
        return found

    def _split_of(self, node: fx.Node, dim: int, layout: Layout) -> tuple[int, list[int]]:
        """The size of the split factors of a dim, and the size that each rank holds of them; 1 if it is whole."""
        shards = [layout.dims[v] for v in self.value(node).virtual(dim) if v in layout.dims]
        return math.prod(s.size for s in shards), [math.prod(s.counts[r] for s in shards) for r in range(self.tp)]

    def extent(self, node: fx.Node, dim: int) -> fx.Node:
        """The size of a dim of the whole value, from that of the part at hand."""
        state = self.states[node]
        whole, local = self._split_of(node, dim, state.layout)
        size = self.size(aten.sym_size.int, state.node, dim)
        if whole > 1:
            size = self.size(operator.floordiv, size, PerRank.of(local))
            size = self.size(operator.mul, size, whole)
        return size

    # Conversions ------------------------------------------------------------------------------

    def _resolve(self, node: fx.Node) -> State:
        state = self.states[node]
        origin, self._current = self._current, node
        value = self.value(node)
        name = f"{state.node.name}_all_reduce"
        reduced = self.call(ops.all_reduce, (state.node, GROUP), state="whole", value=value, name=name)
        if state.addend is not None:
            reduced = self.call(aten.add.Tensor, (reduced, state.addend), state="whole", value=value)
        self._current = origin
        self.states[node] = State(reduced)
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
        for dim, unflat, position, shards in parts:
            held = now.get(dim)
            runs = [
                (held.ranks[r].positions(shards.ranks[r]) if held else shards.ranks[r]).runs for r in range(self.tp)
            ]
            inside = dim + position
            if unflat:
                result = self.call(aten.unflatten.int, (result, dim, unflat), state="whole", value=value)
            result = self.call(ops.narrow, (result, inside, PerRank.of(runs)), state="split", layout=want, value=value)
            if unflat:
                result = self.call(
                    aten.flatten.using_ints,
                    (result, dim, dim + len(unflat) - 1),
                    state="split",
                    layout=want,
                    value=value,
                )
        self._current = origin
        return result

    def _gather(self, node: fx.Node, source: fx.Node, value: Value, have: Layout) -> fx.Node:
        origin, self._current = self._current, node
        parts = self._parts(value, have)
        assert parts is not None, (node, value.axes)
        result, places = source, []
        shift = 0
        for dim, unflat, position, shards in parts:
            inside = dim + shift
            if unflat:
                local = [PerRank.of(list(shards.counts)) if i == position else n for i, n in enumerate(unflat)]
                result = self.call(aten.unflatten.int, (result, inside, local), state="split", layout=have, value=value)
                shift += len(unflat) - 1
                inside += position
            places.append((inside, tuple(s.runs for s in shards.ranks)))
        name = f"{source.name}_all_gather"
        result = self.call(ops.all_gather, (result, tuple(places), GROUP), state="whole", value=value, name=name)
        for dim, unflat, _, _ in parts:
            if unflat:
                result = self.call(
                    aten.flatten.using_ints, (result, dim, dim + len(unflat) - 1), state="whole", value=value
                )
        self._current = origin
        return result

    # The walk ---------------------------------------------------------------------------------

    def _plain(self, node: fx.Node) -> fx.Node:
        return self.whole(node) if is_tensor(node) else self.states[node].node

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

    def _settled(self, node: fx.Node) -> fx.Node:
        """A value as the caller gets it: whole, and its gradient too."""
        plain = self._plain(node)
        if not varies(plain):
            return plain
        settled = self.graph.call_function(ops.settle, (plain, self.group))
        self._describe(settled, node, "split", WHOLE, self.facts.values.get(node))
        settled.meta["state"] = "whole"
        return settled

    def run(self) -> fx.Graph:
        """Rewrite the whole graph."""
        for node in self.captured.nodes:
            self._current = node
            if node.op in ("placeholder", "get_attr"):
                new = self.graph.node_copy(node)
                layout = self.stored.get(node.target, WHOLE) if node.op == "get_attr" else WHOLE
                layout = on_virtual(layout, self.value(node).axes) if not layout.whole else WHOLE
                self._describe(new, node, "whole" if layout.whole else "split", layout, self.facts.values.get(node))
                self.states[node] = State(new, layout)
            elif node.op == "output":
                for operand in node.all_input_nodes:
                    if operand in self.states and not self.states[operand].layout.whole:
                        self.gathered.append((operand, "output"))
                out = self.graph.output(fx.map_arg(node.args[0], self._settled))
                out.meta = {"state": "whole", "origin": "output"}
            elif op_name(node) == "aten.sym_size" and is_tensor(node.args[0]):
                self.states[node] = State(self.extent(*node.args))
            else:
                rule_of(node).shard(node, self)
        return self.graph


def _readable(node: fx.Node) -> str:
    """A node name from the module path and the op: ``layers_0_self_attn_q_proj``, ``layers_0_add``."""
    path = module_path(node).replace(".", "_")
    name = op_name(node)
    short = name.removeprefix("aten.") if name else node.name
    if short in ("linear", "addmm", "embedding", "layer_norm") and path:
        return path
    return f"{path}_{short}" if path else short


def shard(graph: fx.Graph, facts: Facts, layouts: dict[fx.Node, Layout], stored: dict[str, Layout], tp: int) -> Sharder:
    """Rewrite a captured graph for ``tp`` ranks.

    Args:
        graph: the captured, simplified graph.
        facts: what :func:`passes.propagate` found out about it.
        layouts: each value's planned layout (:func:`passes.assign`), on its own virtual dims.
        stored: the layout in which each ``get_attr`` target is held by the ranks.
        tp: the number of ranks.

    Returns:
        The Sharder, whose ``graph`` is the rewritten graph and whose ``gathered`` lists the split
        values that had to be made whole, each with the op that wanted it.
    """
    sharder = Sharder(graph, facts, layouts, stored, tp)
    sharder.run()
    return sharder
