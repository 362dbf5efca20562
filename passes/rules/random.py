"""random: ops that draw random numbers, such as dropout."""

from __future__ import annotations

from typing import Any

from torch import fx

from passes import ops
from passes.rules.base import register
from passes.rules.builder import Builder
from passes.rules.pointwise import Pointwise


@register("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.bernoulli", "aten.rand_like",
          "aten.randn_like", "aten.rrelu")  # fmt: skip
class Random(Pointwise):
    """A pointwise op: on replicated values all ranks draw the same numbers, on shards each rank draws its own."""

    def shard(self, node: fx.Node, builder: Builder) -> None:
        if builder.layout(node).whole or not all(s.disjoint for _, s in builder.layout(node).shards):
            builder.copy(node)
        else:
            super().shard(node, builder)

    def emit_local(self, node: fx.Node, args: Any, kwargs: Any, builder: Builder) -> None:
        builder.emit(node, ops.random_per_rank, (node.target, *args), kwargs, layout=builder.layout(node))
