"""shard: rewrite a captured graph so that each rank computes its shards.

One walk over the graph. The rule of each op (:mod:`passes.rules`) asks the :class:`~passes.rules.builder.Builder` for
its inputs in the layouts that it needs, and emits the node that stands for the op. A conversion is inserted where an
input is not in the wanted layout (:mod:`passes.rules.conversion`).

A partial sum is reduced as late as it pays: sums of partial sums stay partial. A replicated value that is only added
(a bias, a residual) waits beside the partial sum, and is added once, after the reduction.

The result is one graph for all ranks, in which a constant that differs between ranks is a
:class:`~passes.layouts.sharded_value.PerRank`; :func:`passes.localize` picks one rank's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes import ops
from passes.graphs import is_tensor, op_name
from passes.layouts.axes import product
from passes.layouts.facts import Facts
from passes.layouts.layout import WHOLE, Layout
from passes.layouts.relayout import on_virtual, relayout
from passes.layouts.sharded_value import PerRank, varies
from passes.layouts.units import Value
from passes.planning.persistent_state import settled_layout
from passes.rules import rule_of
from passes.rules.builder import Builder

__all__ = ["ShardedGraph", "shard"]


@dataclass(frozen=True)
class ShardedGraph:
    """A captured graph rewritten for all ranks.

    Attributes:
        graph: the rewritten graph.
        gathered: the split values that had to be replicated, each with the name of the op that needed it.
        slots: the layouts of all slots that are known now, by name.
        inputs: the layouts of the split inputs, by position.
        results: the layouts of the split results, by position.
    """

    graph: fx.Graph
    gathered: list[tuple[fx.Node, str]]
    slots: Mapping[str, Layout]
    inputs: Mapping[int, Layout]
    results: Mapping[int, Layout]


def shard(
    graph: fx.Graph,
    facts: Facts,
    layouts: dict[fx.Node, Layout],
    weight_layouts: dict[str, Layout],
    tp: int,
    slots: Mapping[str, Layout] | None = None,
) -> ShardedGraph:
    """Rewrite a captured graph for ``tp`` ranks.

    Args:
        graph: the captured, simplified graph.
        facts: the facts from :func:`passes.propagate` about it.
        layouts: each value's planned layout (:func:`passes.assign`), on its own virtual dims.
        weight_layouts: the layout of each split weight, by ``get_attr`` target.
        tp: the number of ranks.
        slots: the layouts of inputs and results that stay split between calls, as far as they are decided
            (:mod:`passes.planning.persistent_state`).
    """
    walk = _Walk(Builder(facts, layouts, tp), weight_layouts, slots or {})
    for node in graph.nodes:
        walk.visit(node)
    return ShardedGraph(walk.builder.graph, walk.builder.gathered, walk.slots, walk.inputs, walk.results)


class _Walk:
    """The walk over a captured graph: rules emit its ops, the walk itself its inputs, weights and results.

    Attributes:
        builder: the rewritten graph under construction.
        slots: the layouts of slots, by name; those that this graph decides are added.
        inputs: the layouts of the split inputs so far, by position.
        results: the layouts of the split results so far, by position.
    """

    def __init__(self, builder: Builder, weight_layouts: Mapping[str, Layout], slots: Mapping[str, Layout]) -> None:
        self.builder, self.weight_layouts = builder, weight_layouts
        self.slots: dict[str, Layout] = dict(slots)
        self.inputs: dict[int, Layout] = {}
        self.results: dict[int, Layout] = {}
        self._input_count = 0

    def visit(self, node: fx.Node) -> None:
        """Emit what stands for a captured node."""
        builder = self.builder
        builder.origin = node
        if node.op == "get_attr":
            self._source(node, self.weight_layouts.get(str(node.target), WHOLE))
        elif node.op == "placeholder":
            self._source(node, self._input_layout(node, self._input_count))
            self._input_count += 1
        elif node.op == "output":
            self._output(node)
        elif op_name(node) == "aten.sym_size" and is_tensor(node.args[0]):
            builder.record(node, builder.extent(*node.args))
        else:
            rule_of(node).shard(node, builder)

    def _source(self, node: fx.Node, layout: Layout) -> None:
        """Emit an input or a weight, which ranks have in a layout on its dims."""
        builder = self.builder
        new = builder.graph.node_copy(node)
        layout = on_virtual(layout, builder.value(node).axes) if not layout.whole else WHOLE
        builder.describe(new, node, "whole" if layout.whole else "split", layout, builder.facts.values.get(node))
        builder.record(node, new, layout=layout)

    def _input_layout(self, node: fx.Node, position: int) -> Layout:
        """The layout of an input, on its dims; decided here for a slot that has none."""
        if "slot" not in node.meta:
            return WHOLE
        layout = settled_layout(node, self.slots)
        if layout is None and node.meta["slot"] in self.slots:  # another shape than it had
            layout = WHOLE
        if layout is None:
            layout = self._single_dim(self.builder.value(node), self.builder.layout(node))
            self.slots.setdefault(node.meta["slot"], layout)
        if not layout.whole:
            self.inputs[position] = layout
        return layout

    def _single_dim(self, value: Value, layout: Layout) -> Layout:
        """A layout restated on a value's dims if it splits a single one of them; else WHOLE."""
        split_dims = self.builder.split_dims(value, layout) if not layout.whole else None
        if split_dims is None or len(split_dims) != 1 or split_dims[0].sizes:
            return WHOLE
        return Layout.of({split_dims[0].dim: split_dims[0].shards})

    def _output(self, node: fx.Node) -> None:
        """Emit the output node: results in slots stay split, all others are replicated."""
        builder, names = self.builder, node.meta.get("slots", {})
        returned = [n for i, n in enumerate(node.args[0]) if i not in names]
        for operand in dict.fromkeys(returned):
            if operand in builder.states and not builder.states[operand].layout.whole:
                builder.gathered.append((operand, "output"))
        output = builder.graph.output(tuple(self._result(n, i, names.get(i)) for i, n in enumerate(node.args[0])))
        output.meta = {"state": "whole", "origin": "output"}

    def _result(self, node: Any, position: int, slot: str | None) -> Any:
        """One result of the rewritten graph."""
        if not isinstance(node, fx.Node):
            return node
        return self._slot_result(node, position, slot) if slot is not None else self._replicated_result(node)

    def _replicated_result(self, node: fx.Node) -> fx.Node:
        """A result as the caller gets it: replicated, and its gradient too."""
        builder, new = self.builder, self.builder.argument(node)
        if not varies(new):
            return new
        result = builder.graph.call_function(ops.broadcast_from_first, (new, builder.group))
        builder.describe(result, node, "split", WHOLE, builder.facts.values.get(node))
        result.meta["state"] = "whole"
        return result

    def _slot_result(self, node: fx.Node, position: int, slot: str) -> fx.Node:
        """A result as ranks keep it in a slot: its shards, with each index's gradient on one rank only."""
        builder, value = self.builder, self.builder.value(node)
        layout = settled_layout(node, self.slots, slot)
        if layout is None and slot in self.slots:  # another shape than it had
            layout = WHOLE
        if layout is None:
            state = builder.states[node]
            layout = WHOLE if state.pending else self._single_dim(value, state.layout)
            self.slots.setdefault(slot, layout)
        if layout.whole:
            return self._replicated_result(node)
        self.results[position] = layout
        ((dim, shards),) = layout.shards
        trivial = tuple((product(sizes),) if sizes else () for sizes in value.axes)
        wanted = relayout(on_virtual(layout, trivial), trivial, value.axes, builder.tp)
        if wanted is not None:
            new = builder.local(node, wanted)
        else:  # across its factors
            runs = PerRank.of([s.runs for s in shards.ranks])
            new = builder.call(
                ops.narrow, (builder.replicated(node), dim, runs), state="split", layout=layout, value=value
            )
        if shards.disjoint or not node.meta.get("grad"):
            return new
        owned = PerRank.of([s.positions(o).runs for s, o in zip(shards.ranks, shards.owned.ranks, strict=True)])
        return builder.call(
            ops.deduplicate_gradient, (new, dim, owned), state="split", layout=layout, value=value,
            name=f"{new.name}_leave",
        )  # fmt: skip
