"""Ops that only move or copy indices: labels move with them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from passes.axes import Size, trivial_axes, view_axes
from passes.graphs import is_tensor, op_name, shape
from passes.layout import IndexSet, Layout, Shards
from passes.rules.base import Facts, Rule, register
from passes.units import Factor, Value

if TYPE_CHECKING:
    from passes.shard import Sharder

__all__ = ["Expand", "Join", "Part", "Permute", "Regroup"]

aten = torch.ops.aten


def opaque(node: fx.Node, facts: Facts) -> Value:
    """The result of a move that labels cannot follow: whole in, whole out."""
    facts.opaque(node, [n for n in node.all_input_nodes if is_tensor(n)])
    return facts.units.labelled(shape(node))


def shard_move(node: fx.Node, sharder: Sharder, args: Any = None, target: Any = None) -> None:
    """Emit a move of one tensor on the local part, if both its ends are split; else on the whole."""
    source = node.args[0]
    layout = sharder.layout(node)
    if layout.whole or sharder.layout(source).whole:
        sharder.copy(node)
        return
    local = sharder.local(source, sharder.layout(source))
    rest = sharder.rest(node.args[1:]) if args is None else args
    sharder.emit(node, target or node.target, (local, *rest), sharder.rest(dict(node.kwargs)), layout=layout)


@register("aten.reshape", "aten.flatten", "aten.unflatten", "aten.unsqueeze", "aten.squeeze", "aten.view")
class Regroup(Rule):
    """Views that regroup factors: ``"... (h d) -> ... h d"``."""

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        value, out = facts.values[node.args[0]], shape(node)
        found = view_axes(value.axes, out)
        if found is None and (merged := self._all_merged(value, facts)) is not None:
            value, found = merged, view_axes(merged.axes, out)
        if found is None:
            return opaque(node, facts)
        refined, axes = found
        return Value(axes, value.refined(refined).factors)

    @staticmethod
    def _all_merged(value: Value, facts: Facts) -> Value | None:
        """The value with the factors of every static dim made one."""
        for dim, sizes in enumerate(value.axes):
            if all(s.static for s in sizes):
                merged = value.merged(dim, facts.units)
                if merged is None:
                    return None
                value = merged
        return value

    def shard(self, node: fx.Node, sharder: Sharder) -> None:
        name = op_name(node)
        if name == "aten.reshape":
            shard_move(node, sharder, (sharder.local_sizes(node, node.args[1]),))
        elif name == "aten.unflatten":
            dim = node.args[1] % len(shape(node.args[0]))
            shard_move(node, sharder, (dim, sharder.local_sizes(node, node.args[2], dim)))
        else:
            shard_move(node, sharder)


@register("aten.permute", "aten.transpose", "aten.t", "aten.movedim", "aten.swapaxes", "aten.numpy_T", "aten.mT")
class Permute(Rule):
    """``"a b -> b a"``."""

    @staticmethod
    def order(node: fx.Node) -> list[int]:
        """For each dim of the result, the input's dim."""
        rank = len(shape(node))
        probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
        args = fx.map_arg(node.args, lambda n: probe)
        return [n - 2 for n in node.target(*args, **node.kwargs).shape]

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        value, order = facts.values[node.args[0]], self.order(node)
        place = {old: new for new, old in enumerate(v for d in order for v in value.virtual(d))}
        factors = []
        for factor in value.factors:
            dims = [place[v] for v in factor.dims]
            by_place = sorted(range(len(dims)), key=dims.__getitem__)
            factors.append(Factor(tuple(dims[i] for i in by_place), factor.labels.transpose(by_place)))
        return Value(tuple(value.axes[d] for d in order), tuple(factors))

    def shard(self, node: fx.Node, sharder: Sharder) -> None:
        shard_move(node, sharder)


@register("aten.expand", "aten.expand_as", "aten.broadcast_to", "aten.repeat_interleave", "aten.repeat")
class Expand(Rule):
    """Copies along a dim: ``"... 1 -> ... g"``; every copy is served by the one source.

    ``repeat_interleave`` by an integer and ``repeat`` along dims of size one are the same thing: the
    copies make a factor inside, or in place of, the dim.
    """

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        value, out = facts.values[node.args[0]], shape(node)
        added = len(out) - len(value.axes)
        axes: list[tuple[Size, ...]] = [()] * added + list(value.axes)
        name = op_name(node)
        if name == "aten.repeat_interleave":
            if node.target is not aten.repeat_interleave.self_int or node.args[2:3] in ((), (None,)):
                return opaque(node, facts)
            dim = node.args[2] % len(out)
            if not isinstance(node.args[1], int):
                return opaque(node, facts)
            new = {(dim, len(axes[dim])): Size(node.args[1])}
            axes[dim] = axes[dim] + (Size(node.args[1]),)
        else:
            new = {}
            for dim, size in enumerate(out):
                if not axes[dim] and not size.is_one:
                    axes[dim] = (size,)
                    new[dim, 0] = size
                elif name == "aten.repeat" and node.args[1][dim] != 1:
                    return opaque(node, facts)
        result = Value(tuple(axes))
        fresh = [(result.offset(d) + i, s.number) for (d, i), s in new.items() if s.static and not s.is_one]
        places = [v for v in range(len(result.sizes)) if v not in {result.offset(d) + i for d, i in new}]
        moved = [Factor(tuple(places[v] for v in f.dims), f.labels) for f in value.factors]
        for v, number in fresh:
            if len(moved) == 1:
                dims = tuple(sorted((*moved[0].dims, v)))
                spread = np.expand_dims(moved[0].labels, dims.index(v))
                labels = facts.units.fresh([number if d == v else spread.shape[i] for i, d in enumerate(dims)])
                facts.units.serve(labels, spread)
                moved = [Factor(dims, labels)]
            else:
                moved.append(Factor((v,), facts.units.fresh([number])))
        return Value(result.axes, tuple(moved))

    def shard(self, node: fx.Node, sharder: Sharder) -> None:
        name, layout, source = op_name(node), sharder.layout(node), node.args[0]
        have, value, before = layout.dims, sharder.value(node), sharder.value(source)
        if layout.whole:
            sharder.copy(node)
            return
        shift = len(value.axes) - len(before.axes)
        kept = {}
        for dim in range(len(before.axes)):
            for i, v in enumerate(before.virtual(dim)):
                if value.offset(dim + shift) + i in have:
                    kept[v] = have[value.offset(dim + shift) + i]
        local = sharder.local(source, Layout.of(kept))
        if name == "aten.repeat_interleave":
            dim = node.args[2] % len(value.axes)
            copies = have.get(value.virtual(dim)[-1])
            counts: Any = [len(s) for s in copies.ranks] if copies else [node.args[1]] * sharder.tp
            sharder.emit(node, node.target, (local, sharder.per_rank(counts), dim), layout=layout)
            return
        if name == "aten.expand_as":
            sharder.copy(node)
            return
        target = aten.repeat.default if name == "aten.repeat" else aten.expand.default
        sharder.emit(node, target, (local, sharder.local_sizes(node, node.args[1])), layout=layout)


@register("aten.slice", "aten.select", "aten.narrow", "aten.flip", "aten.roll")
class Part(Rule):
    """A part of one dim, by constant bounds: ``x[..., start:stop:step]`` or ``x[..., index]``."""

    @staticmethod
    def taken(node: fx.Node) -> tuple[int, Any] | None:
        """The dim and what is taken of it: a Python slice, an index, or an array; None if not constant."""
        name, args = op_name(node), node.args
        rank = len(shape(node.args[0]))
        if any(isinstance(a, fx.Node) for a in args[1:]) or node.kwargs:
            return None
        if name == "aten.slice":
            dim, start, stop, step = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])
            return dim % rank, slice(start, None if stop == sys.maxsize else stop, step)
        if name == "aten.select":
            return args[1] % rank, args[2]
        if name == "aten.narrow":
            return args[1] % rank, slice(args[2], args[2] + args[3])
        if name == "aten.flip" and len(args[1]) == 1:
            return args[1][0] % rank, slice(None, None, -1)
        return None

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        value, out, taken = facts.values[node.args[0]], shape(node), self.taken(node)
        if taken is None:
            dim = (
                node.args[1] % len(value.axes)
                if op_name(node) in ("aten.slice", "aten.narrow", "aten.select")
                else None
            )
            if dim is None:
                return opaque(node, facts)
            taken = dim, None
        dim, what = taken
        merged = value.merged(dim, facts.units) if what is not None else None
        selects = op_name(node) == "aten.select"
        if merged is None or not merged.axes[dim]:  # a symbolic dim, or one of size one: never split
            if any(set(f.dims) & set(value.virtual(dim)) for f in value.factors):
                return opaque(node, facts)
            axes = value.axes[:dim] + (() if selects else (trivial_axes(out)[dim],)) + value.axes[dim + 1 :]
            return self._placed(value, axes, dim, None, selects)
        axes = merged.axes[:dim] + (() if selects else (trivial_axes(out)[dim],)) + merged.axes[dim + 1 :]
        facts.alignments[node] = merged.axes
        return self._placed(merged, axes, dim, what, selects)

    @staticmethod
    def _placed(value: Value, axes: Any, dim: int, what: Any, selects: bool) -> Value:
        inside = list(value.virtual(dim))
        remains = not selects and bool(axes[dim])
        shift = (len(axes[dim]) if not selects else 0) - len(inside)
        factors = []
        for factor in value.factors:
            labels, dims = factor.labels, list(factor.dims)
            if inside and inside[0] in dims:
                position = dims.index(inside[0])
                if selects:
                    labels = np.take(labels, what, axis=position)
                    dims.pop(position)
                else:
                    labels = labels[(slice(None),) * position + (what,)]
                    if not remains:
                        labels = np.squeeze(labels, position)
                        dims.pop(position)
            if dims:
                after = value.offset(dim) + len(inside)
                factors.append(Factor(tuple(v + shift if v >= after else v for v in dims), labels))
        return Value(tuple(axes), tuple(factors))

    def shard(self, node: fx.Node, sharder: Sharder) -> None:
        source, layout, taken = node.args[0], sharder.layout(node), self.taken(node)
        have = sharder.layout(source)
        if layout.whole or have.whole:
            sharder.copy(node)
            return
        axes = sharder.facts.alignments.get(node)
        merged = sharder.relayout(have, sharder.value(source).axes, axes) if axes is not None else None
        if taken is None or axes is None:
            shard_move(node, sharder)
            return
        dim, what = taken
        place = Value(axes).offset(dim)
        split = merged.dims.get(place) if merged is not None else None
        if merged is not None and split is None:
            shard_move(node, sharder)
            return
        if split is None:
            sharder.copy(node)
            return
        picked = np.arange(split.size)[what]
        positions = []
        for held in split.ranks:
            kept = picked[np.isin(picked, held.indices)] if not np.isscalar(picked) else picked
            if (np.isscalar(picked) and picked not in held.indices) or np.size(kept) == 0:
                sharder.copy(node)
                return
            positions.append(np.searchsorted(held.indices, kept))
        local = sharder.local(source, have)
        if op_name(node) == "aten.select":
            args: tuple[Any, ...] = (local, dim, sharder.per_rank([int(p) for p in positions]))
            sharder.emit(node, aten.select.int, args, layout=layout)
        elif all((np.diff(p) == 1).all() for p in positions):
            start = sharder.per_rank([int(p[0]) for p in positions])
            stop = sharder.per_rank([int(p[-1]) + 1 for p in positions])
            sharder.emit(node, aten.slice.Tensor, (local, dim, start, stop), layout=layout)
        else:
            sharder.emit_take(node, local, dim, positions, layout)


@register("aten.cat")
class Join(Rule):
    """Labels follow one another along the joined dim and agree along the others."""

    @staticmethod
    def dim(node: fx.Node) -> int:
        """The joined dim."""
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return dim % len(shape(node))

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        parts, out, dim = list(node.args[0]), shape(node), self.dim(node)
        values = [facts.values[p] for p in parts]
        if any(len(v.axes) != len(out) for v in values):
            return opaque(node, facts)
        values = [v.merged(dim, facts.units) or v for v in values]
        first = values[0]
        others = [d for d in range(len(out)) if d != dim]
        if any(v.axes[d] != first.axes[d] for v in values for d in others):
            return opaque(node, facts)
        static = all(s.static for v in values for s in v.axes[dim])
        axes = first.axes[:dim] + (trivial_axes(out)[dim],) + first.axes[dim + 1 :]
        place = first.offset(dim)
        by_others: dict[tuple[int, ...], list[tuple[bool, np.ndarray] | None]] = {}
        for i, value in enumerate(values):
            inside = set(value.virtual(dim))
            for factor in value.factors:
                own = tuple(v for v in factor.dims if v not in inside)
                key = tuple(v + 1 - len(inside) if v >= place + len(inside) else v for v in own)
                position = sum(v < place for v in own)
                varies = len(own) < len(factor.dims)
                labels = factor.labels if varies else np.expand_dims(factor.labels, position)
                by_others.setdefault(key, [None] * len(values))[i] = (varies, labels)
        sizes = [v.axes[dim][0].number if v.axes[dim] else 1 for v in values] if static else []
        factors: list[Factor] = []
        for key, found in sorted(by_others.items(), key=lambda item: -len(item[0])):
            position = sum(v < place for v in key)
            known = [labels for each in found if each is not None for labels in [each[1]]]
            joins = static and len(known) == len(values) and (not key or any(each[0] for each in found if each))
            taken = {v for f in factors for v in f.dims}
            if joins and place not in taken and not taken & set(key):
                spread = [np.broadcast_to(x, (*x.shape[:position], n, *x.shape[position + 1 :]))
                          for x, n in zip(known, sizes, strict=True)]  # fmt: skip
                dims = tuple(sorted((*key, place)))
                factors.append(Factor(dims, np.concatenate(spread, axis=position)))
            elif key and not taken & set(key):
                flat = [facts.mix(node, Factor((*key[:position], -1, *key[position:]), x), [-1]) for x in known]
                head = flat[0]
                assert head is not None
                for x in flat[1:]:
                    assert x is not None
                    facts.units.unite(head.labels, x.labels)
                factors.append(Factor(key, head.labels))
            else:
                for x in known:
                    facts.units.unite_all(x)
        if not axes[dim]:  # all parts but one are empty
            return opaque(node, facts)
        facts.alignments[node] = ([v.axes for v in values], sizes)
        return Value(axes, tuple(factors))

    def shard(self, node: fx.Node, sharder: Sharder) -> None:
        layout, parts, dim = sharder.layout(node), list(node.args[0]), self.dim(node)
        if layout.whole or node not in sharder.facts.alignments:
            sharder.copy(node)
            return
        all_axes, sizes = sharder.facts.alignments[node]
        place = sharder.value(node).offset(dim)
        local: list[fx.Node] = []
        start = 0
        for i, part in enumerate(parts):
            axes, has = all_axes[i], len(all_axes[i][dim])
            dims = {v - 1 + has if v > place else v: s for v, s in layout.shards if v != place}
            joined = layout.dims.get(place)
            if joined is not None:
                size = sizes[i]
                inside = [h.indices[(h.indices >= start) & (h.indices < start + size)] - start for h in joined.ranks]
                start += size
                if not all(len(x) for x in inside):
                    sharder.copy(node)
                    return
                if not all(len(x) == size for x in inside):
                    dims[place] = Shards(size, tuple(IndexSet.of(x) for x in inside))
            wanted = sharder.relayout(Layout.of(dims), axes, sharder.value(part).axes)
            if wanted is None:
                sharder.copy(node)
                return
            local.append(sharder.local(part, wanted))
        sharder.emit(node, node.target, (local, dim), layout=layout)
