"""builder: the rewritten graph under construction, as the ops' rules see it.

:func:`passes.shard` walks over the captured graph. The rule of each op (:mod:`passes.rules`) asks the
:class:`Builder` for its inputs in the layouts that it needs, and emits the node that stands for the op. A conversion
is inserted where an input is not in the wanted layout (:mod:`passes.rules.conversion`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx

from passes import ops
from passes.graphs import is_random, is_tensor, op_name
from passes.layouts.axes import Axes
from passes.layouts.facts import Facts
from passes.layouts.layout import WHOLE, Layout, Shards
from passes.layouts.relayout import flattened, relayout
from passes.layouts.sharded_value import PerRank, ShardedValue
from passes.rules.alignment import Alignment, Key
from passes.rules.conversion import Conversion, readable

__all__ = ["Builder"]


class Builder(Conversion):
    """The rewritten graph under construction, and the rewritten value of each captured one.

    Args:
        facts: the facts from :func:`passes.propagate` about the captured graph.
        layouts: each captured value's planned layout, on its own virtual dims.
        tp: the number of ranks.

    Attributes:
        gathered: the split values that had to be replicated, each with the name of the op that needed it.
    """

    def __init__(self, facts: Facts, layouts: dict[fx.Node, Layout], tp: int) -> None:
        super().__init__(facts, layouts, tp)
        self.gathered: list[tuple[fx.Node, str]] = []

    # What a rule asks -------------------------------------------------------------------------

    def out_keys(self, node: fx.Node, alignment: Alignment) -> dict[Key, Shards]:
        """The planned layout of a node's result, by key of its alignment."""
        axes, keys = alignment.out
        layout = relayout(self.layout(node), self.value(node).axes, axes, self.tp)
        return {keys[v]: s for v, s in layout.shards} if layout is not None else {}

    def operand_layout(
        self, operand: fx.Node, alignment: Alignment, index: int, keys: dict[Key, Shards]
    ) -> Layout | None:
        """The layout of an operand that matches shards given by key, on the operand's own virtual dims.

        The operand's virtual dims are refined where they are too coarse to state it.

        Returns:
            The layout; None where it cannot be stated even on refined dims.
        """
        axes, names = alignment.operands[index]
        axes = tuple(
            a if len(a) != 1 or len(b) != 1 or a[0].static or b[0].static else b  # one size in other words
            for a, b in zip(axes, self.value(operand).axes, strict=True)
        )
        layout = Layout.of({v: keys[k] for v, k in enumerate(names) if k in keys})
        restated = relayout(layout, axes, self.value(operand).axes, self.tp)
        if restated is None and self._refine(operand, axes):
            restated = relayout(layout, axes, self.value(operand).axes, self.tp)
        return restated

    def is_partial_sum(self, node: Any) -> bool:
        """Whether a value is a partial sum that only the current op reads."""
        return isinstance(node, fx.Node) and node in self.states and self.states[node].pending and len(node.users) == 1

    def relayout(self, layout: Layout, axes: Axes, other: Axes) -> Layout | None:
        """:func:`relayout` for this number of ranks."""
        return relayout(layout, axes, other, self.tp)

    def owned(self, layout: Layout, axes: Axes) -> Layout | None:
        """The layout in which every index belongs to one rank only, as a sum over the split dims needs it.

        Returns:
            The layout; None where a rank would be left with nothing.
        """
        if len(layout.shards) == 1:
            ((v, shards),) = layout.shards
            return Layout.of({v: shards.owned}) if shards.owned.covers else None
        sizes = [s for dim in axes for s in dim]
        split = [v for v, _ in layout.shards]
        flat = flattened([sizes[v] for v in split], [s for _, s in layout.shards], self.tp)
        return layout if flat is not None and flat.disjoint else None

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
        """Add the call that stands for ``node``.

        Args:
            node: the captured node.
            target: the function to call.
            args: its arguments, rewritten.
            kwargs: its keyword arguments, rewritten.
            layout: the result's layout.
            pending: whether the result is a partial sum.
            addend: for a partial sum, a replicated node to add once after the reduction.
            varying: whether the result is equal on all ranks, but computed from shards.
        """
        state = "pending" if pending else "whole" if layout.whole and not varying else "split"
        new = self.call(target, args, kwargs, state=state, layout=layout, value=self.facts.values.get(node))
        self.record(node, new, layout=layout, pending=pending, addend=addend)

    def record(self, node: fx.Node, new: fx.Node, *, layout: Layout = WHOLE, pending: bool = False,
               addend: fx.Node | None = None) -> None:  # fmt: skip
        """Record the rewritten node that stands for ``node``; the other arguments are those of :meth:`emit`."""
        self.states[node] = ShardedValue(new, layout, pending, addend)

    def emit_take(
        self, node: fx.Node, source: fx.Node, dim: int, positions: Sequence[np.ndarray], layout: Layout
    ) -> None:
        """Emit the selection of each rank's ``positions`` along ``dim``, in their order."""
        lists = self.per_rank([tuple(int(p) for p in array) for array in positions])
        self.emit(node, ops.take, (source, dim, lists), layout=layout)

    def per_rank(self, values: Sequence[Any]) -> Any:
        """A constant of the rewritten graph, from one value for each rank."""
        return PerRank.of(values)

    def copy(self, node: fx.Node) -> None:
        """Emit the same op on replicated inputs."""
        for operand in node.all_input_nodes:
            if is_tensor(operand) and operand in self.states and not self.states[operand].layout.whole:
                self.gathered.append((operand, op_name(node)))
        target, args, kwargs = node.target, self.arguments(node.args), self.arguments(dict(node.kwargs))
        if is_random(node):
            target, args = ops.random_same, (target, *args)
        new = self.graph.create_node(node.op, target, args, kwargs, readable(node))
        self.describe(new, node, "whole", WHOLE, self.facts.values.get(node))
        self.record(node, new)

    def argument(self, node: fx.Node) -> fx.Node:
        """The rewritten node for a captured argument: a tensor replicated, a size as it is."""
        return self.replicated(node) if is_tensor(node) else self.states[node].node

    def arguments(self, args: Any) -> Any:
        """Captured arguments, nested at will, with the rewritten node for each captured one (:meth:`argument`)."""
        return fx.map_arg(args, self.argument)

    def local_sizes(self, node: fx.Node, sizes: Sequence[Any], first: int = 0) -> list[Any]:
        """The size arguments for each rank's shard of ``node``'s result, from those for the global result.

        Args:
            node: the captured node whose planned layout counts.
            sizes: the captured size arguments, for dims ``first``, ``first + 1``, ...
            first: the dim that the first size is for.
        """
        local = []
        for dim, size in enumerate(sizes, start=first):
            total, counts = self._split_sizes(node, dim, self.layout(node))
            size = self.arguments(size)
            if total == 1 or (isinstance(size, int) and size == -1):
                local.append(size)
            elif isinstance(size, int):
                local.append(PerRank.of([size // total * n for n in counts]))
            else:
                rest = self.size(operator.floordiv, size, total)
                local.append(self.size(operator.mul, rest, PerRank.of(counts)))
        return local
