"""normalization: fused norms, ``"... n, n, n -> ... n"``; over a split ``n`` the ranks exchange a few numbers a row."""

from __future__ import annotations

import math

from torch import fx

from passes.graphs import is_tensor, op_name, shape
from passes.layouts.facts import Facts
from passes.layouts.units import Factor, Value
from passes.ops.norms import norm_over_shards
from passes.rules.alignment import align, as_value, combine, keyed_factors
from passes.rules.base import register
from passes.rules.builder import Builder
from passes.rules.pointwise import Pointwise

__all__ = ["Normalization"]


@register("aten.layer_norm", "aten.rms_norm")
class Normalization(Pointwise):
    """Dims before the normalized ones may be split (a norm per head); so may one normalized dim (a norm over heads)."""

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        operands = [n for n in node.all_input_nodes if is_tensor(n)]
        rank, normalized = len(shape(node)), len(node.args[1])
        out = [f"d{i}" for i in range(rank)]
        letters = [out if i == 0 else out[rank - normalized :] for i in range(len(operands))]
        aligned = align([facts.values[n] for n in operands], letters, out, facts.units)
        if aligned is None:
            facts.opaque(node, operands)
            return facts.units.labelled(shape(node))
        alignment, refined = aligned
        inner = set(out[rank - normalized :])
        factors = []
        for keys, labels in (f for keyed in keyed_factors(alignment, refined) for f in keyed):
            mixed = [i for i, k in enumerate(keys) if k[0] in inner]
            if mixed and len(mixed) == len(keys) and normalized == 1:
                facts.exchanged.setdefault(node, []).append(labels)
            elif mixed:
                facts.mix(node, Factor(tuple(range(len(keys))), labels), mixed)
            factors.append((keys, labels))
        facts.alignments[node] = (alignment, operands)
        return as_value(alignment, combine(factors, facts.units))

    def shard(self, node: fx.Node, builder: Builder) -> None:
        value, layout, normalized = builder.value(node), builder.layout(node), len(node.args[1])
        inner = value.virtual(len(value.axes) - 1)
        last = {v for d in range(len(value.axes) - normalized, len(value.axes)) for v in value.virtual(d)}
        if not any(v in last for v, _ in layout.shards):
            super().shard(node, builder)
            return
        local = self.local_operands(node, builder)
        v, shards = layout.shards[0]
        if normalized > 1 or len(layout.shards) > 1 or local is None or not (shards.disjoint or shards.replicas):
            builder.copy(node)
            return
        per_index = math.prod(value.sizes[i].number for i in inner if i != v)
        first = {group[0] for group in shards.replicas or ()} or set(range(builder.tp))  # of ranks with the same shard
        counts = tuple(per_index * n if r in first else 0 for r, n in enumerate(shards.counts))
        centered = op_name(node) == "aten.layer_norm"
        x, weight, bias, eps = self._arguments(node, centered)
        args = (local[x], *(None if n is None else local[n] for n in (weight, bias)), eps, counts, centered)
        builder.emit(node, norm_over_shards, (*args, builder.group), layout=layout)

    @staticmethod
    def _arguments(node: fx.Node, centered: bool) -> tuple[fx.Node, fx.Node | None, fx.Node | None, float | None]:
        """The input, the weight, the bias and eps."""
        x, _, *rest = node.args
        if centered:
            weight, bias, eps = rest + [None, None, 1e-5][len(rest) :] if len(rest) < 3 else rest[:3]
        else:
            (weight, eps), bias = rest + [None, None][len(rest) :], None
        return x, weight, bias, eps
