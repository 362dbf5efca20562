"""lookup: look-ups: ``embedding: "v h, ... -> ... h"``, ``x[:, indices]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.graphs import op_name, shape
from passes.layouts.axes import Size, trivial_axes
from passes.layouts.facts import Facts, without
from passes.layouts.layout import Layout
from passes.layouts.units import Factor, Value
from passes.ops.vocabulary import vocab_parallel_embedding
from passes.rules.alignment import align, as_value, combine, keyed_factors
from passes.rules.base import Rule, register
from passes.rules.builder import Builder
from passes.rules.movement import Move, shifted
from passes.rules.opaque import Opaque
from passes.rules.pointwise import Pointwise

__all__ = ["Embedding", "Index", "IndexPut", "IndexSelect"]


@register("aten.embedding")
class Embedding(Rule):
    """Split rows make the result a partial sum: each rank looks up its own rows, and has zeros for all others.
    Split features split the result."""

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        weight, ids = node.args[0], node.args[1]
        table, index = facts.values[weight], facts.values[ids]
        rows, lead = set(table.virtual(0)), len(index.sizes)
        factors, pending = [], []
        for factor in table.factors:
            if not rows & set(factor.dims):
                factors.append(Factor(tuple(v - len(rows) + lead for v in factor.dims), factor.labels))
            elif set(factor.dims) <= rows:
                pending.append(factor.labels)
            else:
                facts.mix(node, factor)
        facts.opaque(node, [ids])
        facts.pending[node] = pending
        extra: tuple[Size, ...] = ()
        facts.work[node] = (extra, pending)
        return Value(index.axes + table.axes[1:], tuple(factors))

    def shard(self, node: fx.Node, builder: Builder) -> None:
        weight, ids, *rest = node.args
        table, weight_layout, layout = builder.value(weight), builder.layout(weight), builder.layout(node)
        rows = table.virtual(0)
        if not layout.whole and not weight_layout.whole and not any(v in rows for v, _ in weight_layout.shards):
            local = builder.local(weight, weight_layout)
            builder.emit(node, node.target, (local, builder.replicated(ids), *rest), layout=layout)
            return
        one_dim = len(rows) == 1 and len(weight_layout.shards) == 1
        split: Any = weight_layout.dims.get(rows[0]) if one_dim else None
        if any(rest[1:]) or split is None or not split.owned.covers or any(len(s.runs) != 1 for s in split.owned.ranks):
            builder.copy(node)
            return
        local = builder.local(weight, Layout.of({rows[0]: split.owned}))
        padding = rest[0] if rest else -1
        starts = builder.per_rank([s.runs[0][0] for s in split.owned.ranks])
        args = (local, builder.replicated(ids), starts, split.size, padding)
        builder.emit(node, vocab_parallel_embedding, args, pending=True)


@register("aten.index_select")
class IndexSelect(Move):
    """Indices of one dim that is not split, in any order: ``x[..., indices]``."""

    def moved(self, node: fx.Node, facts: Facts) -> Value | None:
        value, out = facts.values[node.args[0]], shape(node)
        if not value.axes:
            return None
        dim = node.args[1] % len(out)
        inside, axes = value.virtual(dim), trivial_axes(out)[dim]
        if any(set(f.dims) & set(inside) for f in value.factors):
            return None
        factors = shifted(value.factors, inside.stop, len(axes) - len(inside))
        return Value(value.axes[:dim] + (axes,) + value.axes[dim + 1 :], factors)


@register("aten.index")
class Index(Move):
    """Indices of neighbouring dims by integer tensors: ``x[:, rows, columns]``; the labels of other dims stay."""

    def moved(self, node: fx.Node, facts: Facts) -> Value | None:
        source, indices = node.args[0], list(node.args[1])
        dims = [d for d, index in enumerate(indices) if index is not None]
        first, count = dims[0], len(dims)
        dtypes = {indices[d].meta["val"].dtype for d in dims}
        if dims != list(range(first, first + count)) or dtypes & {torch.bool, torch.uint8}:
            return None
        value, out = facts.values[source], shape(node)
        inside = range(value.offset(first), value.offset(first + count))
        new = trivial_axes(out[first : first + len(out) - len(value.axes) + count])
        factors = without(node, value, dims, facts).factors
        axes = value.axes[:first] + new + value.axes[first + count :]
        shift = sum(len(dim) for dim in new) - len(inside)
        return Value(axes, shifted(factors, inside.stop, shift))


@register("aten.index_copy", "aten.index_put", "aten.slice_scatter")
class IndexPut(Pointwise):
    """An assignment to indices of one dim that is not split: ``x[:, :, indices] = y``; other dims go index by index.

    The assigned value may lack leading dims.
    """

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        out = shape(node)
        assignment = _assignment(node)
        lacking = len(out) - len(shape(assignment[1])) if assignment is not None else 0
        if assignment is None or not 0 <= lacking <= assignment[0]:
            return Opaque().propagate(node, facts)
        dim, source, indices = assignment
        operands, missing = [node.args[0], source], (0, lacking)
        values = [without(node, facts.values[n], [dim - m], facts) for n, m in zip(operands, missing, strict=True)]
        names = [[f"d{i}" if i != dim else name for i in range(len(out))] for name in ("to", "from")]
        letters = [letters[m:] for letters, m in zip(names, missing, strict=True)]
        aligned = align(values, letters, names[0], facts.units)
        facts.opaque(node, [indices] if indices is not None else [])
        if aligned is None:
            facts.opaque(node, operands)
            return facts.units.labelled(out)
        alignment, refined = aligned
        facts.alignments[node] = (alignment, operands)
        factors = [f for keyed in keyed_factors(alignment, refined) for f in keyed]
        return as_value(alignment, combine(factors, facts.units))


def _assignment(node: fx.Node) -> tuple[int, fx.Node, fx.Node | None] | None:
    """The dim that a node assigns to, the assigned value, and the indices (None: a slice).

    None for an assignment to several dims, by a mask, or that adds.
    """
    if op_name(node) == "aten.slice_scatter":
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        return dim % len(shape(node)), node.args[1], None
    if op_name(node) == "aten.index_copy":
        _, dim, indices, source = node.args
        return dim % len(shape(node)), source, indices
    _, all_indices, source, *accumulate = node.args
    used = [(d, n) for d, n in enumerate(all_indices) if n is not None]
    if len(used) != 1 or any(accumulate) or node.kwargs or used[0][1].meta["val"].dtype in (torch.bool, torch.uint8):
        return None
    ((dim, indices),) = used
    return (dim, source, indices) if len(shape(indices)) == 1 else None
