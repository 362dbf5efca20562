"""movement: ops that only move or copy indices; labels move with them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import fx

from passes.graphs import is_tensor, op_name, shape
from passes.layouts.axes import Axes, Size, product, trivial_axes, view_axes
from passes.layouts.facts import Facts, without
from passes.layouts.layout import Layout
from passes.layouts.units import Factor, Value
from passes.rules.base import Rule, register
from passes.rules.builder import Builder

__all__ = ["Expand", "Move", "Permute", "Regroup", "Slice", "Unfold", "shifted"]

aten = torch.ops.aten


def shifted(factors: Iterable[Factor], stop: int, shift: int) -> tuple[Factor, ...]:
    """Factors with ``shift`` added to the numbers of the virtual dims from ``stop`` on."""
    return tuple(Factor(tuple(v + shift if v >= stop else v for v in f.dims), f.labels) for f in factors)


class Move(Rule):
    """A move of one tensor: the labels follow it, or else its input and result are replicated."""

    def moved(self, node: fx.Node, facts: Facts) -> Value | None:
        """The labelled result; None where labels cannot follow the move."""
        raise NotImplementedError

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        value = self.moved(node, facts)
        if value is None:
            facts.opaque(node, [n for n in node.all_input_nodes if is_tensor(n)])
            return facts.units.labelled(shape(node))
        return value

    def shard(self, node: fx.Node, builder: Builder) -> None:
        if node in builder.facts.wanted_whole or builder.layout(node).whole:
            builder.copy(node)
        else:
            self.shard_split(node, builder)

    def shard_split(self, node: fx.Node, builder: Builder) -> None:
        """Emit the move for a split result."""
        self.emit(node, builder, builder.arguments(node.args[1:]))

    @staticmethod
    def emit(node: fx.Node, builder: Builder, args: tuple[Any, ...], target: Any = None) -> None:
        """Emit the move of the rank's shard of the input, in the input's planned layout."""
        source = node.args[0]
        if builder.layout(source).whole:
            builder.copy(node)
            return
        local = builder.local(source, builder.layout(source))
        kwargs = builder.arguments(dict(node.kwargs))
        builder.emit(node, target or node.target, (local, *args), kwargs, layout=builder.layout(node))


@register("aten.reshape", "aten.flatten", "aten.unflatten", "aten.unsqueeze", "aten.squeeze", "aten.view")
class Regroup(Move):
    """Views that regroup factors: ``"... (h d) -> ... h d"``."""

    def moved(self, node: fx.Node, facts: Facts) -> Value | None:
        value, out = facts.values[node.args[0]], shape(node)
        both = view_axes(value.axes, out)
        if both is None:  # the view cuts across factors: it may still follow entire dims
            value = self._merged(value, facts)
            both = view_axes(value.axes, out)
        if both is None:
            return self._outer_dims(value, out)
        refined, axes = both
        return Value(axes, value.refined(refined).factors)

    @staticmethod
    def _outer_dims(value: Value, out: tuple[Size, ...]) -> Value | None:
        """The viewed value with the labels of its first and last dims, which the view leaves as they are.

        None where the dims between, which the view regroups, have labels too.
        """
        sizes = [product(dim) for dim in value.axes]
        first = next((i for i, (a, b) in enumerate(zip(sizes, out)) if a != b), 0)
        rest = zip(reversed(sizes[first:]), reversed(out[first:]))
        last = next((i for i, (a, b) in enumerate(rest) if a != b), 0)
        mixed = range(value.offset(first), value.offset(len(sizes) - last))
        if any(set(mixed) & set(f.dims) for f in value.factors):
            return None
        axes = value.axes[:first] + trivial_axes(out[first : len(out) - last]) + value.axes[len(sizes) - last :]
        return Value(axes, shifted(value.factors, mixed.stop, sum(len(dim) for dim in axes) - len(value.sizes)))

    @staticmethod
    def _merged(value: Value, facts: Facts) -> Value:
        """The value with the factors of every static dim merged into one."""
        for dim in range(len(value.axes)):
            value = value.merged(dim, facts.units) or value
        return value

    def shard_split(self, node: fx.Node, builder: Builder) -> None:
        name, source = op_name(node), shape(node.args[0])
        if name == "aten.reshape":
            self.emit(node, builder, (builder.local_sizes(node, node.args[1]),))
        elif name == "aten.unflatten":
            dim = node.args[1] % len(source)
            self.emit(node, builder, (dim, builder.local_sizes(node, node.args[2], dim)))
        elif name == "aten.squeeze":  # a dim that is one only on this rank stays
            argument = node.args[1] if len(node.args) > 1 else range(len(source))
            dims = {d % len(source) for d in ([argument] if isinstance(argument, int) else argument)}
            self.emit(node, builder, ([d for d in sorted(dims) if source[d].is_one],), aten.squeeze.dims)
        else:
            super().shard_split(node, builder)


@register("aten.permute", "aten.transpose", "aten.t", "aten.movedim", "aten.swapaxes", "aten.numpy_T", "aten.mT")
class Permute(Move):
    """``"a b -> b a"``."""

    @staticmethod
    def order(node: fx.Node) -> list[int]:
        """For each dim of the result, the dim of the input."""
        probe = torch.empty(tuple(range(2, 2 + len(shape(node)))), device="meta")
        args = fx.map_arg(node.args, lambda n: probe)
        return [n - 2 for n in node.target(*args, **node.kwargs).shape]

    def moved(self, node: fx.Node, facts: Facts) -> Value:
        value, order = facts.values[node.args[0]], self.order(node)
        new_dims = {old: new for new, old in enumerate(v for d in order for v in value.virtual(d))}
        factors = []
        for factor in value.factors:
            dims = [new_dims[v] for v in factor.dims]
            ascending = sorted(range(len(dims)), key=dims.__getitem__)
            factors.append(Factor(tuple(dims[i] for i in ascending), factor.labels.transpose(ascending)))
        return Value(tuple(value.axes[d] for d in order), tuple(factors))


@register("aten.expand", "aten.broadcast_to")
class Expand(Move):
    """Copies along a dim of size one or a new one: ``"... 1 -> ... g"``; the source serves every copy."""

    def moved(self, node: fx.Node, facts: Facts) -> Value:
        value, out = facts.values[node.args[0]], shape(node)
        old_axes = [()] * (len(out) - len(value.axes)) + list(value.axes)
        copied = [dim for dim, size in enumerate(out) if not old_axes[dim] and not size.is_one]
        result = Value(tuple((out[dim],) if dim in copied else axes for dim, axes in enumerate(old_axes)))
        new = [result.offset(dim) for dim in copied]
        old = [v for v in range(len(result.sizes)) if v not in new]
        factors = [Factor(tuple(old[v] for v in f.dims), f.labels) for f in value.factors]
        for v in new:
            size = result.sizes[v]
            if not size.static:
                continue
            neighbours = [f for f in factors if v - 1 in f.dims] or [f for f in factors if v + 1 in f.dims]
            neighbours = neighbours or factors[: len(factors) == 1]
            if v and neighbours:  # copies of a head; along dim 0 they are copies of a batch
                factors = [self._copied(f, v, size.number, facts) if f is neighbours[0] else f for f in factors]
            else:
                factors.append(Factor((v,), facts.units.fresh([size.number])))
        return Value(result.axes, tuple(factors))

    @staticmethod
    def _copied(source: Factor, v: int, copies: int, facts: Facts) -> Factor:
        """A factor that varies over the copies too; the source's label serves the label of each copy."""
        dims = tuple(sorted((*source.dims, v)))
        spread = np.expand_dims(source.labels, dims.index(v))
        labels = facts.units.fresh([copies if d == v else n for d, n in zip(dims, spread.shape, strict=True)])
        facts.units.serve(labels, spread)
        return Factor(dims, labels)

    def shard_split(self, node: fx.Node, builder: Builder) -> None:
        layout, source = builder.layout(node), node.args[0]
        value, before = builder.value(node), builder.value(source)
        shift = len(value.axes) - len(before.axes)
        shards = {}
        for dim in range(len(before.axes)):
            for v, p in zip(before.virtual(dim), value.virtual(dim + shift)):  # a copied dim has none in the source
                if p in layout.dims:
                    shards[v] = layout.dims[p]
        local = builder.local(source, Layout.of(shards))
        builder.emit(node, node.target, (local, builder.local_sizes(node, node.args[1])), layout=layout)


@register("aten.slice", "aten.select", "aten.narrow", "aten.flip")
class Slice(Move):
    """Some indices of one dim, by constant bounds: ``x[..., start:stop:step]`` or ``x[..., index]``."""

    @staticmethod
    def dim(node: fx.Node) -> int | None:
        """The dim that is sliced; None for several."""
        dim = node.args[1] if len(node.args) > 1 else 0
        if isinstance(dim, (list, tuple)):
            if len(dim) != 1:
                return None
            (dim,) = dim
        return dim % len(shape(node.args[0]))

    @staticmethod
    def bounds(node: fx.Node, size: Size) -> slice | None:
        """The slice of a dim of this size; None where it is not constant."""
        name, bounds = op_name(node), node.args[2:]
        if not size.static or node.kwargs or any(isinstance(b, fx.Node) for b in bounds):
            return None
        if name == "aten.flip":
            return slice(None, None, -1)
        if name == "aten.slice":
            start, stop, step = list(bounds) + [None, None, 1][len(bounds) :]
            return slice(start, None if stop == sys.maxsize else stop, step)
        start = bounds[0] % size.number if size.number else 0
        return slice(start, start + (1 if name == "aten.select" else bounds[1]))

    def moved(self, node: fx.Node, facts: Facts) -> Value | None:
        value, dim = facts.values[node.args[0]], self.dim(node)
        if dim is None:
            return None
        new_axes = () if op_name(node) == "aten.select" else (trivial_axes(shape(node))[dim],)
        bounds = self.bounds(node, shape(node.args[0])[dim])
        if bounds is not None and (merged := value.merged(dim, facts.units)) is not None:
            facts.alignments[node] = (merged.axes, dim, bounds)
            if not new_axes:
                picked = [f.labels for f in merged.factors if set(f.dims) <= set(merged.virtual(dim))]
                if picked:
                    facts.picked[node] = picked
            return self._sliced(merged, dim, new_axes, bounds)
        return self._sliced(without(node, value, [dim], facts), dim, new_axes, slice(None))

    @staticmethod
    def _sliced(value: Value, dim: int, new_axes: Axes, bounds: slice) -> Value:
        """The value with ``new_axes`` in place of ``dim``, and with the labels of ``dim`` sliced."""
        inside, count = value.virtual(dim), sum(len(sizes) for sizes in new_axes)
        factors = []
        for factor in value.factors:
            labels, dims = factor.labels, list(factor.dims)
            if varying := [v for v in dims if v in inside]:
                axis = dims.index(varying[0])
                labels = labels[(slice(None),) * axis + (bounds,)]
                if not count:
                    labels = labels.squeeze(axis)
                    del dims[axis]
            new_dims = tuple(v + count - len(inside) if v >= inside.stop else v for v in dims)
            if new_dims:
                factors.append(Factor(new_dims, labels))
        return Value(value.axes[:dim] + new_axes + value.axes[dim + 1 :], tuple(factors))

    def shard(self, node: fx.Node, builder: Builder) -> None:
        if node in builder.facts.alignments and builder.layout(node).whole and self._is_on_all_ranks(node, builder):
            self.shard_split(node, builder)
        else:
            super().shard(node, builder)

    @staticmethod
    def _is_on_all_ranks(node: fx.Node, builder: Builder) -> bool:
        """Whether every rank's shard of a split input contains the entire slice (the one key head of multi-query)."""
        axes, dim, bounds = builder.facts.alignments[node]
        source_layout = builder.layout(node.args[0])
        if source_layout.whole:
            return False
        merged = builder.relayout(source_layout, builder.value(node.args[0]).axes, axes)
        if merged is None or len(merged.shards) != 1 or merged.shards[0][0] != Value(axes).offset(dim):
            return False
        split = merged.shards[0][1]
        picked = np.arange(split.size)[bounds]
        return bool(picked.size) and all(np.isin(picked, rank.indices).all() for rank in split.ranks)

    def shard_split(self, node: fx.Node, builder: Builder) -> None:
        source, layout = node.args[0], builder.layout(node)
        source_layout = builder.layout(source)
        if node not in builder.facts.alignments or source_layout.whole:  # no label on the dim, so no split
            super().shard_split(node, builder)
            return
        axes, dim, bounds = builder.facts.alignments[node]
        merged = builder.relayout(source_layout, builder.value(source).axes, axes)
        if merged is None:
            builder.copy(node)
            return
        split = merged.dims.get(Value(axes).offset(dim)) if axes[dim] else None
        if split is None:
            super().shard_split(node, builder)
            return
        picked = np.arange(split.size)[bounds]
        per_rank = [picked[np.isin(picked, rank.indices)] for rank in split.ranks]
        if not all(indices.size for indices in per_rank):
            builder.copy(node)
            return
        positions = [np.searchsorted(rank.indices, x) for rank, x in zip(split.ranks, per_rank, strict=True)]
        local = builder.local(source, source_layout)
        if op_name(node) == "aten.select":
            index = builder.per_rank([int(p[0]) for p in positions])
            builder.emit(node, aten.select.int, (local, dim, index), layout=layout, varying=layout.whole)
        elif all((np.diff(p) == 1).all() for p in positions):
            start = builder.per_rank([int(p[0]) for p in positions])
            stop = builder.per_rank([int(p[-1]) + 1 for p in positions])
            builder.emit(node, aten.slice.Tensor, (local, dim, start, stop), layout=layout, varying=layout.whole)
        else:
            builder.emit_take(node, local, dim, positions, layout)


@register("aten.unfold")
class Unfold(Move):
    """Windows of one dim, which stays unsplit; the elements of a window are a new last dim."""

    def moved(self, node: fx.Node, facts: Facts) -> Value | None:
        value, axes = facts.values[node.args[0]], trivial_axes(shape(node))
        if not value.axes:  # a window of a scalar
            return None
        dim = node.args[1] % len(value.axes)
        factors = without(node, value, [dim], facts).factors
        factors = shifted(factors, value.virtual(dim).stop, len(axes[dim]) - len(value.axes[dim]))
        return Value((*value.axes[:dim], axes[dim], *value.axes[dim + 1 :], axes[-1]), factors)
