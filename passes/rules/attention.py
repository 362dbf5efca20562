"""attention: scaled dot-product attention, head by head.

``"... h q d, ... h k d -> ... h q k"``, then softmax over ``k``, then
``"... h q k, ... h k v -> ... h q v"``. With ``enable_gqa`` a key-value head serves a group of query
heads: ``h`` is then ``(kv group)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from passes import ops
from passes.graphs import is_tensor, shape
from passes.layouts.axes import Size
from passes.layouts.facts import Facts
from passes.layouts.units import Factor, Value
from passes.rules.alignment import Alignment, align, as_value, combine, keyed_factors
from passes.rules.base import Rule, register
from passes.rules.builder import Builder

__all__ = ["Attention"]


@register("aten.scaled_dot_product_attention")
class Attention(Rule):
    """Heads may be split: each rank computes the attention of its own heads only.

    The queries of a head may be split too, where a model lays out the query heads that share a key-value head one
    after another, as more queries of one head.
    """

    def _operands(self, node: fx.Node) -> tuple[list[fx.Node], list[list[str]], list[str]]:
        """Queries, keys, values and mask, a letter for each of their dims, and the result's letters."""
        query, key, value, *rest = node.args
        mask = rest[0] if rest else node.kwargs.get("attn_mask")
        lead = [f"b{i}" for i in range(len(shape(node)) - 2)]
        pairs = [(query, "qd"), (key, "kd"), (value, "kv")] + [(mask, "qk")] * (mask is not None)
        operands = [operand for operand, _ in pairs]
        letters = [[*lead, *pair][-len(shape(operand)) :] for operand, pair in pairs]
        return operands, letters, [*lead, "q", "v"]

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        operands, letters, out = self._operands(node)
        values = [facts.values[n] for n in operands]
        repeats = Size(1)
        if self._grouped_queries(node):  # give keys and values the factor that query heads have inside theirs
            query_heads, kv_heads = shape(operands[0])[-3], shape(operands[1])[-3]
            group = query_heads.over(kv_heads)
            if group is None or not query_heads.static or not kv_heads.static:
                return self._opaque(node, operands, facts)
            repeats = group
            values[1:3] = [self._grouped(v, kv_heads, group, facts) for v in values[1:3]]
        aligned = align(values, letters, out, facts.units)
        if aligned is None:
            return self._opaque(node, operands, facts)
        alignment, refined = aligned
        across = []
        factors = [f for keyed in keyed_factors(alignment, refined) for f in keyed]
        head_letters = [{k[0] for k in keys} & {*out[:-2]} for keys, _ in factors]
        heads_as_queries = any(
            lead and "q" in {k[0] for k in keys} for lead, (keys, _) in zip(head_letters, factors, strict=True)
        )
        mixed_letters = "kdv" if heads_as_queries and not self._is_ordered(node) else "qkd"
        for keys, labels in factors:
            mixed = [i for i, k in enumerate(keys) if k[0] in mixed_letters]
            if not mixed:
                across.append((keys, labels))
            elif (rest := facts.mix(node, Factor(tuple(range(len(keys))), labels), mixed)) is not None:
                across.append((tuple(keys[i] for i in rest.dims), rest.labels))
        combined = combine(across, facts.units, across=[k for k in alignment.sizes if k[0] != "q"])
        facts.alignments[node] = (self._without_repeats(alignment, repeats), operands)
        facts.work[node] = (tuple(alignment.sizes.values()), [labels for _, labels in combined])
        return as_value(alignment, combined)

    def _grouped_queries(self, node: fx.Node) -> bool:
        """Whether one key-value head serves several query heads."""
        return bool(node.kwargs.get("enable_gqa"))

    def _is_ordered(self, node: fx.Node) -> bool:
        """Whether the result depends on a query's position among the others."""
        return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal"))

    @staticmethod
    def _opaque(node: fx.Node, operands: list[fx.Node], facts: Facts) -> Value:
        """The result with new labels, where all operands have to be replicated."""
        facts.opaque(node, operands)
        return facts.units.labelled(shape(node))

    @staticmethod
    def _grouped(value: Value, kv_heads: Size, group: Size, facts: Facts) -> Value:
        """Labelled keys (or values) as if each head were repeated for the ``group`` query heads that it serves."""
        dim = len(value.axes) - 3
        merged = value.merged(dim, facts.units)
        assert merged is not None  # the heads are static
        if kv_heads.is_one or group.is_one:
            return merged
        after = merged.virtual(dim)[-1]
        axes = merged.axes[:dim] + ((kv_heads, group),) + merged.axes[dim + 1 :]
        factors = []
        for factor in merged.factors:
            dims = tuple(v + 1 if v > after else v for v in factor.dims)
            if after in dims:
                axis = dims.index(after) + 1
                source = np.expand_dims(factor.labels, axis)
                labels = facts.units.fresh([*source.shape[:axis], group.number, *source.shape[axis + 1 :]])
                facts.units.serve(labels, source)
                factors.append(Factor((*dims[:axis], after + 1, *dims[axis:]), labels))
            else:
                factors.append(Factor(dims, factor.labels))
        return Value(axes, tuple(factors))

    @staticmethod
    def _without_repeats(alignment: Alignment, repeats: Size) -> Alignment:
        """The alignment for keys and values as they are stored, without the factor that repeats their heads."""
        operands = list(alignment.operands)
        for i in (1, 2):
            axes, names = operands[i]
            dim = len(axes) - 3
            end = Value(axes).virtual(dim).stop if dim >= 0 else 0
            count, rest = 0, repeats
            while not rest.is_one and count < len(axes[dim]):
                count += 1
                rest = rest.over(axes[dim][-count]) or Size(1)
            heads = axes[dim][: len(axes[dim]) - count]
            operands[i] = (axes[:dim] + (heads,) + axes[dim + 1 :], names[: end - count] + names[end:])
        return Alignment(tuple(operands), alignment.out, alignment.sizes)

    def shard(self, node: fx.Node, builder: Builder) -> None:
        layout = builder.layout(node)
        if layout.whole or node not in builder.facts.alignments:
            builder.copy(node)
            return
        alignment, operands = builder.facts.alignments[node]
        keys = builder.out_keys(node, alignment)
        local: dict[fx.Node, fx.Node] = {}
        for i, operand in enumerate(operands):
            operand_layout = builder.operand_layout(operand, alignment, i, keys)
            if not keys or operand_layout is None:
                builder.copy(node)
                return
            local[operand] = builder.local(operand, operand_layout)
        args, kwargs = fx.map_arg(
            (node.args, dict(node.kwargs)), lambda n: local[n] if n in local else builder.argument(n)
        )
        target, args = self._on_heads(node, args, kwargs)
        builder.emit(node, target, args, kwargs, layout=layout)

    def _on_heads(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        """The op that computes the attention of a rank's own heads, and its arguments."""
        if args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0):
            return ops.random_per_rank, (node.target, *args)
        return ops.head_parallel_attention, args


@register("flex_attention_outputs")
class FlexAttention(Attention):
    """flex_attention, where neither the mask nor the function on scores depends on the split heads (or batch)."""

    def _operands(self, node: fx.Node) -> tuple[list[fx.Node], list[list[str]], list[str]]:
        lead = [f"b{i}" for i in range(len(shape(node)) - 2)]
        return list(node.args[:3]), [[*lead, *pair] for pair in ("qd", "kd", "kv")], [*lead, "q", "v"]

    def _grouped_queries(self, node: fx.Node) -> bool:
        query, key, *_ = node.args
        return shape(query)[1] != shape(key)[1]

    def _is_ordered(self, node: fx.Node) -> bool:
        return True  # the functions on scores may depend on it

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        operands = list(node.args[:3])
        rest = [n for n in node.all_input_nodes if is_tensor(n) and n not in operands]
        facts.opaque(node, rest)
        scores, (*blocks, mask) = node.args[3], node.args[4]
        sizes = [shape(n) for n in blocks if is_tensor(n) and len(shape(n)) > 2]
        batches, heads = (
            _reads(scores, dim + 1) or _reads(mask, dim) or not all(dims[dim].is_one for dims in sizes)
            for dim in (0, 1)
        )
        values = [facts.values[n] for n in operands]
        folded = any(set(f.dims) & set(v.virtual(0)) for v in values for f in v.factors)  # heads in the batch dim
        if heads or (batches and folded) or any(n.meta.get("grad") for n in rest):
            return self._opaque(node, operands, facts)
        return super().propagate(node, facts)

    def _on_heads(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        return node.target, args


def _reads(region: fx.Node, position: int) -> bool:
    """Whether a function that a graph calls reads its argument at ``position``."""
    graph = getattr(region.meta.get("region"), "graph", None)
    inputs = [n for n in graph.nodes if n.op == "placeholder"] if graph is not None else []
    return graph is None or bool(inputs[position].users)
