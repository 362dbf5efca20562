"""Scaled dot-product attention, head by head.

``"... h q d, ... h k d -> ... h q k"``, then softmax over ``k``, then
``"... h q k, ... h k v -> ... h q v"``. With ``enable_gqa`` a key-value head serves a group of query
heads: ``h`` is then ``(kv group)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from passes import ops
from passes.axes import Size
from passes.graphs import shape
from passes.rules.base import Facts, Rule, align, as_value, combine, keyed_factors, register
from passes.units import Factor, Value

if TYPE_CHECKING:
    from passes.shard import Sharder

__all__ = ["Attention"]


@register("aten.scaled_dot_product_attention")
class Attention(Rule):
    """Heads may be split; a rank attends with its own heads only."""

    def _operands(self, node: fx.Node) -> tuple[list[fx.Node], list[list[str]], list[str], bool]:
        query, key, value, *rest = node.args
        mask = rest[0] if rest else node.kwargs.get("attn_mask")
        grouped = bool(node.kwargs.get("enable_gqa", False))
        out = len(shape(node))
        lead = [f"b{i}" for i in range(out - 2)]
        operands, letters = [query, key, value], []
        for operand, pair in ((query, "qd"), (key, "kd"), (value, "kv")):
            own = len(shape(operand)) - 2
            letters.append([*lead[len(lead) - own :], *pair])
        if mask is not None:
            operands.append(mask)
            own = len(shape(mask)) - 2
            letters.append([*lead[len(lead) - own :], *"qk"][-len(shape(mask)) :])
        return operands, letters, [*lead, "q", "v"], grouped

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        operands, letters, out, grouped = self._operands(node)
        values = [facts.values[n] for n in operands]
        if grouped:  # give keys and values the factor that query heads have inside theirs
            heads, shared = shape(operands[0])[-3], shape(operands[1])[-3]
            each = heads.over(shared)
            if each is None or not heads.static or not shared.static:
                return self._opaque(node, operands, facts)
            values = [self._grouped(v, shared, each, heads, facts) if i in (1, 2) else v for i, v in enumerate(values)]
        found = align(values, letters, out, facts.units)
        if found is None:
            return self._opaque(node, operands, facts)
        alignment, refined = found
        across = []
        for each_factors in keyed_factors(alignment, refined):
            for keys, labels in each_factors:
                inner = [i for i, k in enumerate(keys) if k[0] in "qkd"]
                factor = facts.mix(node, Factor(tuple(range(len(keys))), labels), inner) if inner else None
                if inner and factor is None:
                    continue
                kept = tuple(keys[i] for i in factor.dims) if factor is not None else keys
                across.append((kept, factor.labels if factor is not None else labels))
        kept_factors = combine(across, facts.units, unite_nested=True)
        facts.alignments[node] = (alignment, operands, [v.axes for v in values], grouped)
        facts.work[node] = (tuple(alignment.sizes.values()), [labels for _, labels in kept_factors])
        return as_value(alignment, kept_factors)

    @staticmethod
    def _opaque(node: fx.Node, operands: list[fx.Node], facts: Facts) -> Value:
        facts.opaque(node, operands)
        return facts.units.labelled(shape(node))

    @staticmethod
    def _grouped(value: Value, shared: Size, each: Size, heads: Size, facts: Facts) -> Value:
        """Keys (or values) as if each head were repeated for the ``each`` query heads it serves."""
        dim = len(value.axes) - 3
        merged = value.merged(dim, facts.units)
        assert merged is not None
        if shared.is_one:
            return Value(merged.axes, merged.factors)
        after = merged.virtual(dim)[-1]
        axes = merged.axes[:dim] + ((shared, each),) + merged.axes[dim + 1 :]
        factors = []
        for factor in merged.factors:
            dims = tuple(v + 1 if v > after else v for v in factor.dims)
            if after in dims and not each.is_one:
                at = dims.index(after) + 1
                source = factor.labels
                spread = source.reshape(*source.shape[:at], 1, *source.shape[at:])
                labels = facts.units.fresh([*source.shape[:at], each.number, *source.shape[at:]])
                facts.units.serve(labels, spread)
                factors.append(Factor((*dims[:at], after + 1, *dims[at:]), labels))
            else:
                factors.append(Factor(dims, factor.labels))
        assert heads.static
        return Value(axes, tuple(factors))

    def shard(self, node: fx.Node, sharder: Sharder) -> None:
        layout = sharder.layout(node)
        if layout.whole or node not in sharder.facts.alignments:
            sharder.copy(node)
            return
        alignment, operands, axes, grouped = sharder.facts.alignments[node]
        keys = sharder.out_keys(node, alignment)
        wanted = []
        for i, operand in enumerate(operands):
            own, names = alignment.operands[i]
            if grouped and i in (1, 2):  # drop the factor that repeats: the source head is wanted once
                wanted.append(sharder.layout(operand))
                continue
            wanted.append(sharder.operand_layout(operand, alignment, i, keys))
        if not keys or any(w is None for w in wanted):
            sharder.copy(node)
            return
        local = {n: sharder.local(n, w) for n, w in zip(operands, wanted, strict=True)}
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: local[n] if n in local else sharder.rest(n))
        target: Any = ops.head_parallel_attention
        dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
        if dropout:
            target, args = ops.random_per_rank, (node.target, *args)
        sharder.emit(node, target, args, kwargs, layout=layout)
        assert axes
