"""Ops that only move or copy indices: labels move with them."""

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

__all__ = ["Expand", "Move", "Part", "Permute", "Regroup", "behind"]

aten = torch.ops.aten


def behind(factors: Iterable[Factor], stop: int, shift: int) -> tuple[Factor, ...]:
    """Factors where the virtual dims from ``stop`` on have moved by ``shift``."""
    return tuple(Factor(tuple(v + shift if v >= stop else v for v in f.dims), f.labels) for f in factors)


class Move(Rule):
    """A move of one tensor: labels follow it, or else it is whole in and whole out."""

    def moved(self, node: fx.Node, facts: Facts) -> Value | None:
        """The labelled result; None where labels cannot follow."""
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
        """Emit the move on the rank's part, given that the result is split."""
        self.emit(node, builder, builder.arguments(node.args[1:]))

    @staticmethod
    def emit(node: fx.Node, builder: Builder, args: tuple[Any, ...], target: Any = None) -> None:
        """Emit the move on the rank's part of its input, as the plan splits that."""
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
        found = view_axes(value.axes, out)
        if found is None:  # the view cuts across factors: it may still follow whole dims
            value = self._merged(value, facts)
            found = view_axes(value.axes, out)
        if found is None:
            return self._beside(value, out)
        refined, axes = found
        return Value(axes, value.refined(refined).factors)

    @staticmethod
    def _beside(value: Value, out: tuple[Size, ...]) -> Value | None:
        """The value where the dims that a view mixes up carry no labels (sequences): first and last dims remain."""
        was = [product(dim) for dim in value.axes]
        first = next((i for i, (a, b) in enumerate(zip(was, out)) if a != b), 0)
        rest = zip(reversed(was[first:]), reversed(out[first:]))
        last = next((i for i, (a, b) in enumerate(rest) if a != b), 0)
        mixed = range(value.offset(first), value.offset(len(was) - last))
        if any(set(mixed) & set(f.dims) for f in value.factors):
            return None
        axes = value.axes[:first] + trivial_axes(out[first : len(out) - last]) + value.axes[len(was) - last :]
        return Value(axes, behind(value.factors, mixed.stop, sum(len(dim) for dim in axes) - len(value.sizes)))

    @staticmethod
    def _merged(value: Value, facts: Facts) -> Value:
        """The value with the factors of every static dim made one."""
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
            named = node.args[1] if len(node.args) > 1 else range(len(source))
            dims = {d % len(source) for d in ([named] if isinstance(named, int) else named)}
            self.emit(node, builder, ([d for d in sorted(dims) if source[d].is_one],), aten.squeeze.dims)
        else:
            super().shard_split(node, builder)


@register("aten.permute", "aten.transpose", "aten.t", "aten.movedim", "aten.swapaxes", "aten.numpy_T", "aten.mT")
class Permute(Move):
    """``"a b -> b a"``."""

    @staticmethod
    def order(node: fx.Node) -> list[int]:
        """For each dim of the result, the input's dim."""
        probe = torch.empty(tuple(range(2, 2 + len(shape(node)))), device="meta")
        args = fx.map_arg(node.args, lambda n: probe)
        return [n - 2 for n in node.target(*args, **node.kwargs).shape]

    def moved(self, node: fx.Node, facts: Facts) -> Value:
        value, order = facts.values[node.args[0]], self.order(node)
        place = {old: new for new, old in enumerate(v for d in order for v in value.virtual(d))}
        factors = []
        for factor in value.factors:
            dims = [place[v] for v in factor.dims]
            by_place = sorted(range(len(dims)), key=dims.__getitem__)
            factors.append(Factor(tuple(dims[i] for i in by_place), factor.labels.transpose(by_place)))
        return Value(tuple(value.axes[d] for d in order), tuple(factors))


@register("aten.expand", "aten.broadcast_to")
class Expand(Move):
    """Copies along a dim of size one or a new one: ``"... 1 -> ... g"``; the source serves every copy."""

    def moved(self, node: fx.Node, facts: Facts) -> Value:
        value, out = facts.values[node.args[0]], shape(node)
        was = [()] * (len(out) - len(value.axes)) + list(value.axes)
        copied = [dim for dim, size in enumerate(out) if not was[dim] and not size.is_one]
        result = Value(tuple((out[dim],) if dim in copied else axes for dim, axes in enumerate(was)))
        new = [result.offset(dim) for dim in copied]
        places = [v for v in range(len(result.sizes)) if v not in new]
        factors = [Factor(tuple(places[v] for v in f.dims), f.labels) for f in value.factors]
        for v in new:
            size = result.sizes[v]
            if not size.static:
                continue
            beside = [f for f in factors if v - 1 in f.dims] or [f for f in factors if v + 1 in f.dims]
            if v and (beside := beside or factors[: len(factors) == 1]):  # copies of a head; along dim 0, of a batch
                factors = [self._copied(f, v, size.number, facts) if f is beside[0] else f for f in factors]
            else:
                factors.append(Factor((v,), facts.units.fresh([size.number])))
        return Value(result.axes, tuple(factors))

    @staticmethod
    def _copied(source: Factor, v: int, copies: int, facts: Facts) -> Factor:
        """A factor that varies over copies too; each copy's label is served by its source's."""
        dims = tuple(sorted((*source.dims, v)))
        spread = np.expand_dims(source.labels, dims.index(v))
        labels = facts.units.fresh([copies if d == v else n for d, n in zip(dims, spread.shape, strict=True)])
        facts.units.serve(labels, spread)
        return Factor(dims, labels)

    def shard_split(self, node: fx.Node, builder: Builder) -> None:
        layout, source = builder.layout(node), node.args[0]
        value, before = builder.value(node), builder.value(source)
        shift = len(value.axes) - len(before.axes)
        kept = {}
        for dim in range(len(before.axes)):
            for v, p in zip(before.virtual(dim), value.virtual(dim + shift)):  # none, where the copies are
                if p in layout.dims:
                    kept[v] = layout.dims[p]
        local = builder.local(source, Layout.of(kept))
        builder.emit(node, node.target, (local, builder.local_sizes(node, node.args[1])), layout=layout)


@register("aten.slice", "aten.select", "aten.narrow", "aten.flip")
class Part(Move):
    """A part of one dim, by constant bounds: ``x[..., start:stop:step]`` or ``x[..., index]``."""

    @staticmethod
    def dim(node: fx.Node) -> int | None:
        """The dim of which a part is taken; None for several."""
        dim = node.args[1] if len(node.args) > 1 else 0
        if isinstance(dim, (list, tuple)):
            if len(dim) != 1:
                return None
            (dim,) = dim
        return dim % len(shape(node.args[0]))

    @staticmethod
    def taken(node: fx.Node, size: Size) -> slice | None:
        """What is taken of a dim of this size; None where that is not constant."""
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
        remains = () if op_name(node) == "aten.select" else (trivial_axes(shape(node))[dim],)
        what = self.taken(node, shape(node.args[0])[dim])
        if what is not None and (merged := value.merged(dim, facts.units)) is not None:
            facts.alignments[node] = (merged.axes, dim, what)
            if not remains:
                alone = [f.labels for f in merged.factors if set(f.dims) <= set(merged.virtual(dim))]
                if alone:
                    facts.picked[node] = alone
            return self._part(merged, dim, remains, what)
        return self._part(without(node, value, [dim], facts), dim, remains, slice(None))

    @staticmethod
    def _part(value: Value, dim: int, remains: Axes, what: slice) -> Value:
        """The value with what ``remains`` in place of ``dim``, and what is taken of the labels on it."""
        inside, left = value.virtual(dim), sum(len(sizes) for sizes in remains)
        factors = []
        for factor in value.factors:
            labels, dims = factor.labels, list(factor.dims)
            if varies := [v for v in dims if v in inside]:
                at = dims.index(varies[0])
                labels = labels[(slice(None),) * at + (what,)]
                if not left:
                    labels = labels.squeeze(at)
                    del dims[at]
            moved = tuple(v + left - len(inside) if v >= inside.stop else v for v in dims)
            if moved:
                factors.append(Factor(moved, labels))
        return Value(value.axes[:dim] + remains + value.axes[dim + 1 :], tuple(factors))

    def shard(self, node: fx.Node, builder: Builder) -> None:
        if node in builder.facts.alignments and builder.layout(node).whole and self._held_by_all(node, builder):
            self.shard_split(node, builder)
        else:
            super().shard(node, builder)

    @staticmethod
    def _held_by_all(node: fx.Node, builder: Builder) -> bool:
        """Whether every rank's part of a split input has all of what is taken (the one key of multi-query)."""
        axes, dim, what = builder.facts.alignments[node]
        have = builder.layout(node.args[0])
        merged = builder.relayout(have, builder.value(node.args[0]).axes, axes) if not have.whole else None
        if merged is None or len(merged.shards) != 1 or merged.shards[0][0] != Value(axes).offset(dim):
            return False
        split = merged.shards[0][1]
        picked = np.arange(split.size)[what]
        return bool(picked.size) and all(np.isin(picked, held.indices).all() for held in split.ranks)

    def shard_split(self, node: fx.Node, builder: Builder) -> None:
        source, layout = node.args[0], builder.layout(node)
        have = builder.layout(source)
        if node not in builder.facts.alignments or have.whole:  # no label on the dim, so no split
            super().shard_split(node, builder)
            return
        axes, dim, what = builder.facts.alignments[node]
        merged = builder.relayout(have, builder.value(source).axes, axes)
        if merged is None:
            builder.copy(node)
            return
        split = merged.dims.get(Value(axes).offset(dim)) if axes[dim] else None
        if split is None:
            super().shard_split(node, builder)
            return
        picked = np.arange(split.size)[what]
        kept = [picked[np.isin(picked, held.indices)] for held in split.ranks]
        if not all(k.size for k in kept):
            builder.copy(node)
            return
        positions = [np.searchsorted(held.indices, k) for held, k in zip(split.ranks, kept, strict=True)]
        local = builder.local(source, have)
        if op_name(node) == "aten.select":
            index = builder.per_rank([int(p[0]) for p in positions])
            builder.emit(node, aten.select.int, (local, dim, index), layout=layout, varying=layout.whole)
        elif all((np.diff(p) == 1).all() for p in positions):
            start = builder.per_rank([int(p[0]) for p in positions])
            stop = builder.per_rank([int(p[-1]) + 1 for p in positions])
            builder.emit(node, aten.slice.Tensor, (local, dim, start, stop), layout=layout, varying=layout.whole)
        else:
            builder.emit_take(node, local, dim, positions, layout)
