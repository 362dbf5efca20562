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
from passes.rules.movement import Move, behind

__all__ = ["Complex", "Join", "Pad"]


@register("aten.pad", "aten.constant_pad_nd", "aten.roll")
class Pad(Move):
    """What is put beside the indices of some dims, or turns them, mixes those."""

    @staticmethod
    def dims(node: fx.Node) -> list[int]:
        """The dims that change."""
        rank, amounts = len(shape(node)), node.args[1]
        if op_name(node) == "aten.roll":
            given = node.args[2] if len(node.args) > 2 else []
            return [d % rank for d in ([given] if isinstance(given, int) else given)] or list(range(rank))
        pairs = zip(amounts[::2], amounts[1::2], strict=True)
        return [rank - 1 - i for i, pair in enumerate(pairs) if any(isinstance(a, fx.Node) or a for a in pair)]

    def moved(self, node: fx.Node, facts: Facts) -> Value:
        value, out = facts.values[node.args[0]], trivial_axes(shape(node))
        for dim in sorted(self.dims(node), reverse=True):
            inside = value.virtual(dim)
            kept = without(node, value, [dim], facts).factors
            axes = value.axes[:dim] + (out[dim],) + value.axes[dim + 1 :]
            value = Value(axes, behind(kept, inside.stop, len(out[dim]) - len(inside)))
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
        parts, out, dim = list(node.args[0]), shape(node), self.dim(node)
        if any(len(shape(p)) != len(out) for p in parts) or out[dim].is_one:  # torch skips empty parts
            return None
        values = [v.merged(dim, facts.units) or v for v in (facts.values[p] for p in parts)]
        finest = values[0].axes
        for value in values[1:]:
            both = [common_refinement(a, b) if d != dim else a for d, (a, b) in enumerate(zip(finest, value.axes))]
            if None in both:
                return None
            finest = tuple(x for x in both if x is not None)
        values = [v.refined((*finest[:dim], v.axes[dim], *finest[dim + 1 :])) for v in values]
        first = values[0]
        static = all(s.static for v in values for s in v.axes[dim])
        sizes = [v.axes[dim][0].number if v.axes[dim] else 1 for v in values] if static else []
        place = first.offset(dim)
        found: Keyed = []
        for key, labelled in self._by_others(values, dim):
            at = sum(v < place for v in key)
            labels = [x for x, _ in labelled]
            apart = not key or any(varies for _, varies in labelled) or self._stacked(labels, sizes, facts)
            if static and len(labelled) == len(values) and apart and not any(("", place) in keys for keys, _ in found):
                spread = [np.broadcast_to(x, (*x.shape[:at], n, *x.shape[at + 1 :])) for x, n in zip(labels, sizes)]
                found.append((tuple(("", v) for v in sorted((*key, place))), np.concatenate(spread, axis=at)))
                continue
            mixed = [facts.mix(node, Factor((*key[:at], -1, *key[at:]), x), [-1]) for x in labels]
            found += [(tuple(("", v) for v in key), m.labels) for m in mixed if m is not None]
        factors = [Factor(tuple(v for _, v in keys), labels) for keys, labels in combine(found, facts.units)]
        facts.alignments[node] = ([v.axes for v in values], sizes)
        return Value(first.axes[:dim] + (trivial_axes(out)[dim],) + first.axes[dim + 1 :], tuple(factors))

    @staticmethod
    def _by_others(values: list[Value], dim: int) -> list[tuple[tuple[int, ...], list[tuple[np.ndarray, bool]]]]:
        """The parts' labels by the result's virtual dims, but the joined one, on which they vary; most dims first.

        Each with an axis for the joined dim, and whether they vary on it.
        """
        place = values[0].offset(dim)
        found: dict[tuple[int, ...], list[tuple[np.ndarray, bool]]] = {}
        for value in values:
            inside = value.virtual(dim)
            for factor in value.factors:
                own = [v for v in factor.dims if v not in inside]
                varies, at = len(own) < len(factor.dims), sum(v < place for v in own)
                key = tuple(v + 1 - len(inside) if v >= inside.stop else v for v in own)
                labels = factor.labels if varies else np.expand_dims(factor.labels, at)
                found.setdefault(key, []).append((labels, varies))
        return sorted(found.items(), key=lambda item: -len(item[0]))

    @staticmethod
    def _stacked(labels: list[np.ndarray], sizes: list[int], facts: Facts) -> bool:
        """Whether parts of size one are different things side by side, not one thing at successive positions."""
        if any(n != 1 for n in sizes):
            return False
        if len(labels) == 2:  # of a rotary embedding, say
            return True
        roots = facts.units.roots()
        return any((roots[x] != roots[labels[0]]).any() for x in labels)

    def shard_split(self, node: fx.Node, builder: Builder) -> None:
        layout, parts, dim = builder.layout(node), list(node.args[0]), self.dim(node)
        all_axes, sizes = builder.facts.alignments[node]
        place = builder.value(node).offset(dim)
        local: list[fx.Node] = []
        start = 0
        for i, (part, axes) in enumerate(zip(parts, all_axes, strict=True)):
            dims = {v - 1 + len(axes[dim]) if v > place else v: s for v, s in layout.shards if v != place}
            if (joined := layout.dims.get(place)) is not None:
                size = sizes[i]
                inside = [h.indices[(h.indices >= start) & (h.indices < start + size)] - start for h in joined.ranks]
                start += size
                if not all(len(x) for x in inside):
                    builder.copy(node)
                    return
                if not all(len(x) == size for x in inside):
                    dims[place] = Shards(size, tuple(IndexSet.of(x) for x in inside))
            wanted = builder.relayout(Layout.of(dims), axes, builder.value(part).axes)
            if wanted is None:
                builder.copy(node)
                return
            local.append(builder.local(part, wanted))
        builder.emit(node, node.target, (local, dim), layout=layout)
