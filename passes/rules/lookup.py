"""Look-ups of rows: ``embedding: "v h, ... -> ... h"``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from passes import ops
from passes.axes import Size
from passes.layout import Layout
from passes.rules.base import Facts, Rule, register
from passes.units import Factor, Value

if TYPE_CHECKING:
    from passes.shard import Sharder

__all__ = ["Embedding"]


@register("aten.embedding")
class Embedding(Rule):
    """Split rows make the result a pending sum (each rank looks up what it holds, zero elsewhere);
    split features split the result."""

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

    def shard(self, node: fx.Node, sharder: Sharder) -> None:
        weight, ids, *rest = node.args
        table, held, layout = sharder.value(weight), sharder.layout(weight), sharder.layout(node)
        rows = table.virtual(0)
        if not layout.whole and not held.whole and not any(v in rows for v, _ in held.shards):
            local = sharder.local(weight, held)
            sharder.emit(node, node.target, (local, sharder.whole(ids), *rest), layout=layout)
            return
        split: Any = held.dims.get(rows[0]) if len(rows) == 1 and len(held.shards) == 1 else None
        if any(rest[1:]) or split is None or not split.owned.covers or any(len(s.runs) != 1 for s in split.owned.ranks):
            sharder.copy(node)
            return
        local = sharder.local(weight, Layout.of({rows[0]: split.owned}))
        padding = rest[0] if rest else -1
        starts = sharder.per_rank([s.runs[0][0] for s in split.owned.ranks])
        args = (local, sharder.whole(ids), starts, split.size, padding)
        sharder.emit(node, ops.vocab_parallel_embedding, args, pending=True)
