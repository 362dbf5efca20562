"""builder: the rewritten graph under construction: what a rule may ask, and emit.

One walk over the graph. Each op's rule (:mod:`passes.rules`) asks the :class:`Builder` for its inputs
in the layouts it needs and emits what stands for the op; a conversion is inserted where an input is not in
the wanted layout (:mod:`passes.rules.conversion`).

A pending sum is resolved as late as it pays: sums of sums stay pending, and what is whole and only
added (a bias, a residual) waits beside it and is added once, after the reduction.

The result is one graph for all ranks in which a constant that differs between ranks is a
:class:`PerRank`; :func:`passes.localize` picks one rank's.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from passes import ops
from passes.graphs import is_random, is_tensor, op_name
from passes.layouts.axes import Axes, product
from passes.layouts.facts import Facts
from passes.layouts.layout import WHOLE, Layout, Shards
from passes.layouts.relayout import flattened, on_virtual, relayout
from passes.layouts.sharded_value import PerRank, ShardedValue, varies
from passes.layouts.units import Value
from passes.planning.persistent_state import settled_layout
from passes.rules import rule_of
from passes.rules.alignment import Alignment, Key
from passes.rules.conversion import Conversion, readable

__all__ = ["Builder"]


class Builder(Conversion):
    """The rewritten graph under construction, and where each captured value stands in it."""

    def __init__(
        self,
        graph: fx.Graph,
        facts: Facts,
        layouts: dict[fx.Node, Layout],
        weight_layouts: dict[str, Layout],
        tp: int,
        slots: Mapping[str, Layout] | None = None,
    ) -> None:
        super().__init__(facts, layouts, tp)
        self.captured, self.weight_layouts = graph, weight_layouts
        self.gathered: list[tuple[fx.Node, str]] = []
        self.slots: dict[str, Layout] = dict(slots or {})
        self.inputs: dict[int, Layout] = {}
        self.results: dict[int, Layout] = {}
        self._output_slots: Mapping[int, str] = {}

    # What a rule asks -------------------------------------------------------------------------

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

    def pending(self, node: Any) -> bool:
        """Whether a value is a pending sum that nothing but the current op reads."""
        return isinstance(node, fx.Node) and node in self.states and self.states[node].pending and len(node.users) == 1

    # What a rule emits ------------------------------------------------------------------------

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
        self.states[node] = ShardedValue(new, layout, pending, addend)

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
        new = self.graph.create_node(node.op, target, args, kwargs, readable(node))
        self._describe(new, node, "whole", WHOLE, self.facts.values.get(node))
        self.states[node] = ShardedValue(new)

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

    # The walk ---------------------------------------------------------------------------------

    def _plain(self, node: fx.Node) -> fx.Node:
        return self.whole(node) if is_tensor(node) else self.states[node].node

    def _settled(self, node: fx.Node) -> fx.Node:
        """A value as the caller gets it: whole, and its gradient too."""
        plain = self._plain(node)
        if not varies(plain):
            return plain
        settled = self.graph.call_function(ops.broadcast_from_first, (plain, self.group))
        self._describe(settled, node, "split", WHOLE, self.facts.values.get(node))
        settled.meta["state"] = "whole"
        return settled

    def _kept_input(self, node: fx.Node, position: int) -> Layout:
        """The layout, on its dims, in which ranks are given an input; decided here for a slot that has none."""
        if "slot" not in node.meta:
            return WHOLE
        layout = settled_layout(node, self.slots)
        if layout is None and node.meta["slot"] in self.slots:  # another shape than it had
            layout = WHOLE
        if layout is None:
            layout = self._on_one_dim(self.value(node), self.layout(node))
            self.slots.setdefault(node.meta["slot"], layout)
        if not layout.whole:
            self.inputs[position] = layout
        return layout

    def _on_one_dim(self, value: Value, layout: Layout) -> Layout:
        """A layout as one on dims, if it splits a single one; else whole."""
        parts = self._parts(value, layout) if not layout.whole else None
        if parts is None or len(parts) != 1 or parts[0][1]:
            return WHOLE
        ((dim, _, _, shards),) = parts
        return Layout.of({dim: shards})

    def _kept_result(self, node: fx.Node, position: int, name: str) -> fx.Node:
        """A result as ranks keep it in a slot: their parts, each index with its gradient on one rank only."""
        value = self.value(node)
        layout = settled_layout(node, self.slots, name)
        if layout is None and name in self.slots:
            layout = WHOLE
        if layout is None:
            state = self.states[node]
            layout = WHOLE if state.pending else self._on_one_dim(value, state.layout)
            self.slots.setdefault(name, layout)
        if layout.whole:
            return self._settled(node)
        self.results[position] = layout
        ((dim, shards),) = layout.shards
        trivial = tuple((product(sizes),) if sizes else () for sizes in value.axes)
        wanted = relayout(on_virtual(layout, trivial), trivial, value.axes, self.tp)
        if wanted is not None:
            held = self.local(node, wanted)
        else:  # across its factors
            runs = PerRank.of([s.runs for s in shards.ranks])
            held = self.call(ops.narrow, (self.whole(node), dim, runs), state="split", layout=layout, value=value)
        if shards.disjoint or not node.meta.get("grad"):
            return held
        mine = PerRank.of([s.positions(o).runs for s, o in zip(shards.ranks, shards.owned.ranks, strict=True)])
        name = f"{held.name}_leave"
        return self.call(
            ops.deduplicate_gradient, (held, dim, mine), state="split", layout=layout, value=value, name=name
        )

    def _result(self, node: Any, position: int) -> Any:
        name = self._output_slots.get(position)
        if not isinstance(node, fx.Node):
            return node
        return self._kept_result(node, position, name) if name is not None else self._settled(node)

    def run(self) -> fx.Graph:
        """Rewrite the whole graph."""
        positions = itertools.count()
        for node in self.captured.nodes:
            self._current = node
            if node.op in ("placeholder", "get_attr"):
                new = self.graph.node_copy(node)
                if node.op == "get_attr":
                    layout = self.weight_layouts.get(node.target, WHOLE)
                else:
                    layout = self._kept_input(node, next(positions))
                layout = on_virtual(layout, self.value(node).axes) if not layout.whole else WHOLE
                self._describe(new, node, "whole" if layout.whole else "split", layout, self.facts.values.get(node))
                self.states[node] = ShardedValue(new, layout)
            elif node.op == "output":
                self._output_slots = node.meta.get("slots", {})
                returned = [n for i, n in enumerate(node.args[0]) if i not in self._output_slots]
                for operand in dict.fromkeys(returned):
                    if operand in self.states and not self.states[operand].layout.whole:
                        self.gathered.append((operand, "output"))
                out = self.graph.output(tuple(self._result(n, i) for i, n in enumerate(node.args[0])))
                out.meta = {"state": "whole", "origin": "output"}
            elif op_name(node) == "aten.sym_size" and is_tensor(node.args[0]):
                self.states[node] = ShardedValue(self.extent(*node.args))
            else:
                rule_of(node).shard(node, self)
        return self.graph
