"""joins: cat, stack, pad, complex pairs."""

from __future__ import annotations

import numpy as np
from torch import fx

from passes.graphs import op_name, shape
from passes.layouts.axes import Size, common_refinement, trivial_axes
from passes.layouts.facts import Facts, without
from passes.layouts.layout import IndexSet, Layout, Shards
from passes.layouts.units import Factor, Value
from passes.rules.alignment import Keyed, combine
from passes.rules.base import register
from passes.rules.builder import Builder
from passes.rules.movement import Move, shifted

__all__ = ["Complex", "Join", "Pad"]


@register("aten.pad", "aten.constant_pad_nd", "aten.roll")
class Pad(Move):
    """Padding and rolling: they mix the indices of the dims that they change."""

    @staticmethod
    def dims(node: fx.Node) -> list[int]:
        """The dims that change."""
        rank, amounts = len(shape(node)), node.args[1]
        if op_name(node) == "aten.roll":
            dims = node.args[2] if len(node.args) > 2 else []
            return [d % rank for d in ([dims] if isinstance(dims, int) else dims)] or list(range(rank))
        pairs = zip(amounts[::2], amounts[1::2], strict=True)
        return [rank - 1 - i for i, pair in enumerate(pairs) if any(isinstance(a, fx.Node) or a for a in pair)]

    def moved(self, node: fx.Node, facts: Facts) -> Value:
        value, out = facts.values[node.args[0]], trivial_axes(shape(node))
        for dim in sorted(self.dims(node), reverse=True):
            inside = value.virtual(dim)
            factors = without(node, value, [dim], facts).factors
            axes = value.axes[:dim] + (out[dim],) + value.axes[dim + 1 :]
            value = Value(axes, shifted(factors, inside.stop, len(out[dim]) - len(inside)))
        return value


@register("aten.view_as_complex", "aten.view_as_real")
class Complex(Move):
    """``"... 2 -> ..."``, or back: real and imaginary part stay together."""

    def moved(self, node: fx.Node, facts: Facts) -> Value:
        value = facts.values[node.args[0]]
        if op_name(node) == "aten.view_as_real":
            return Value((*value.axes, (Size(2),)), value.factors)
        return Value(value.axes[:-1], without(node, value, [len(value.axes) - 1], facts).factors)


@register("aten.cat")
class Join(Move):
    """Labels follow one another along the joined dim and agree along the others."""

    @staticmethod
    def dim(node: fx.Node) -> int:
        """The joined dim."""
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return dim % len(shape(node))

    def moved(self, node: fx.Node, facts: Facts) -> Value | None:
        operands, out, dim = list(node.args[0]), shape(node), self.dim(node)
        if any(len(shape(n)) != len(out) for n in operands) or out[dim].is_one:  # torch skips empty ones
            return None
        values = [v.merged(dim, facts.units) or v for v in (facts.values[n] for n in operands)]
        finest = values[0].axes
        for value in values[1:]:
            finer = [common_refinement(a, b) if d != dim else a for d, (a, b) in enumerate(zip(finest, value.axes))]
            if None in finer:
                return None
            finest = tuple(x for x in finer if x is not None)
        values = [v.refined((*finest[:dim], v.axes[dim], *finest[dim + 1 :])) for v in values]
        first = values[0]
        static = all(s.static for v in values for s in v.axes[dim])
        sizes = [v.axes[dim][0].number if v.axes[dim] else 1 for v in values] if static else []
        joined = first.offset(dim)
        keyed: Keyed = []
        for dims, factors in self._by_other_dims(values, dim):
            axis = sum(v < joined for v in dims)
            labels = [x for x, _ in factors]
            distinct = not dims or any(varies for _, varies in factors) or self._stacked(labels, sizes, facts)
            if static and len(factors) == len(values) and distinct and not any(("", joined) in k for k, _ in keyed):
                spread = [np.broadcast_to(x, (*x.shape[:axis], n, *x.shape[axis + 1 :])) for x, n in zip(labels, sizes)]
                keyed.append((tuple(("", v) for v in sorted((*dims, joined))), np.concatenate(spread, axis=axis)))
                continue
            mixed = [facts.mix(node, Factor((*dims[:axis], -1, *dims[axis:]), x), [-1]) for x in labels]
            keyed += [(tuple(("", v) for v in dims), m.labels) for m in mixed if m is not None]
        result = tuple(Factor(tuple(v for _, v in keys), labels) for keys, labels in combine(keyed, facts.units))
        facts.alignments[node] = ([v.axes for v in values], sizes)
        return Value(first.axes[:dim] + (trivial_axes(out)[dim],) + first.axes[dim + 1 :], result)

    @staticmethod
    def _by_other_dims(values: list[Value], dim: int) -> list[tuple[tuple[int, ...], list[tuple[np.ndarray, bool]]]]:
        """The labels of joined values, grouped by the other virtual dims of the result that they vary on.

        Returns:
            Per tuple of virtual dims, most dims first: the labels, with an axis for the joined dim, and whether they
            vary on it.
        """
        joined = values[0].offset(dim)
        by_dims: dict[tuple[int, ...], list[tuple[np.ndarray, bool]]] = {}
        for value in values:
            inside = value.virtual(dim)
            for factor in value.factors:
                others = [v for v in factor.dims if v not in inside]
                varies, axis = len(others) < len(factor.dims), sum(v < joined for v in others)
                dims = tuple(v + 1 - len(inside) if v >= inside.stop else v for v in others)
                labels = factor.labels if varies else np.expand_dims(factor.labels, axis)
                by_dims.setdefault(dims, []).append((labels, varies))
        return sorted(by_dims.items(), key=lambda item: -len(item[0]))

    @staticmethod
    def _stacked(labels: list[np.ndarray], sizes: list[int], facts: Facts) -> bool:
        """Whether values of size one are different things side by side, not one thing at successive positions."""
        if any(n != 1 for n in sizes):
            return False
        if len(labels) == 2:  # of a rotary embedding, say
            return True
        roots = facts.units.roots()
        return any((roots[x] != roots[labels[0]]).any() for x in labels)

    def shard_split(self, node: fx.Node, builder: Builder) -> None:
        layout, operands, dim = builder.layout(node), list(node.args[0]), self.dim(node)
        all_axes, sizes = builder.facts.alignments[node]
        joined = builder.value(node).offset(dim)
        local: list[fx.Node] = []
        start = 0
        for i, (operand, axes) in enumerate(zip(operands, all_axes, strict=True)):
            dims = {v - 1 + len(axes[dim]) if v > joined else v: s for v, s in layout.shards if v != joined}
            if (split := layout.dims.get(joined)) is not None:
                size = sizes[i]
                inside = [s.indices[(s.indices >= start) & (s.indices < start + size)] - start for s in split.ranks]
                start += size
                if not all(len(x) for x in inside):
                    builder.copy(node)
                    return
                if not all(len(x) == size for x in inside):
                    dims[joined] = Shards(size, tuple(IndexSet.of(x) for x in inside))
            operand_layout = builder.relayout(Layout.of(dims), axes, builder.value(operand).axes)
            if operand_layout is None:
                builder.copy(node)
                return
            local.append(builder.local(operand, operand_layout))
        builder.emit(node, node.target, (local, dim), layout=layout)
