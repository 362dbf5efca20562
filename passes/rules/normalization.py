"""Fused norms: ``"... n, n, n -> ... n"``, mixing ``n``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from passes.graphs import is_tensor, shape
from passes.rules.base import Facts, align, as_value, combine, keyed_factors, register
from passes.rules.pointwise import Pointwise
from passes.units import Factor, Value

if TYPE_CHECKING:
    from passes.shard import Sharder

__all__ = ["Normalization"]


@register("aten.layer_norm", "aten.rms_norm")
class Normalization(Pointwise):
    """The normalized dims stay whole; the dims before them may be split (a norm per head)."""

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        operands = [n for n in node.all_input_nodes if is_tensor(n)]
        rank, normalized = len(shape(node)), len(node.args[1])
        out = [f"d{i}" for i in range(rank)]
        letters = [out if i == 0 else out[rank - normalized :] for i in range(len(operands))]
        found = align([facts.values[n] for n in operands], letters, out, facts.units)
        if found is None:
            facts.opaque(node, operands)
            return facts.units.labelled(shape(node))
        alignment, refined = found
        inner = set(out[rank - normalized :])
        factors = []
        for keys, labels in (f for each in keyed_factors(alignment, refined) for f in each):
            mixed = [i for i, k in enumerate(keys) if k[0] in inner]
            if mixed:
                facts.mix(node, Factor(tuple(range(len(keys))), labels), mixed)
            factors.append((keys, labels))
        facts.alignments[node] = (alignment, operands)
        return as_value(alignment, combine(factors, facts.units))

    def shard(self, node: fx.Node, sharder: Sharder) -> None:
        value, normalized = sharder.value(node), len(node.args[1])
        inner = {v for d in range(len(value.axes) - normalized, len(value.axes)) for v in value.virtual(d)}
        if any(v in inner for v, _ in sharder.layout(node).shards):
            sharder.copy(node)
            return
        super().shard(node, sharder)
