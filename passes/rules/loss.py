"""loss: cross entropy over classes that may be split: ``"n c, n -> n"``."""

from __future__ import annotations

from typing import Any

from torch import fx

from passes.graphs import is_tensor, shape
from passes.layouts.facts import Facts
from passes.layouts.layout import Layout
from passes.layouts.units import Value
from passes.ops.vocabulary import vocab_parallel_cross_entropy
from passes.rules.base import Rule, register
from passes.rules.builder import Builder

__all__ = ["CrossEntropy"]


@register("aten.cross_entropy_loss")
class CrossEntropy(Rule):
    """With integer targets the ranks exchange the sums over their classes, not their logits."""

    @staticmethod
    def _is_plain(node: fx.Node) -> bool:
        """Whether the logits are a matrix and the targets integers."""
        logits, target = node.args[:2]
        return not target.meta["val"].is_floating_point() and len(shape(logits)) == 2

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        logits = facts.values[node.args[0]]
        operands = [n for n in node.all_input_nodes if is_tensor(n)]
        classes = set(logits.virtual(1)) if self._is_plain(node) else set()
        rows = [f for f in logits.factors if not classes & set(f.dims)]
        columns = [f for f in logits.factors if set(f.dims) <= classes]
        if len(rows) + len(columns) != len(logits.factors) or not classes:
            facts.opaque(node, operands)
        else:
            for factor in rows:
                facts.mix(node, factor)
            facts.opaque(node, operands[1:])
            facts.alignments[node] = sorted(classes)
        return facts.units.labelled(shape(node))

    def shard(self, node: fx.Node, builder: Builder) -> None:
        logits, target = node.args[:2]
        rest: list[Any] = list(node.args[2:])
        layout = builder.layout(logits)
        classes: Any = builder.facts.alignments.get(node)
        split = layout.dims.get(classes[0]) if classes and len(classes) == 1 and len(layout.shards) == 1 else None
        if split is None or not split.owned.covers or any(len(s.runs) != 1 for s in split.owned.ranks):
            builder.copy(node)
            return
        local = builder.local(logits, Layout.of({classes[0]: split.owned}))
        starts = builder.per_rank([s.runs[0][0] for s in split.owned.ranks])
        weight, reduction, ignore, smoothing = rest + [None, 1, -100, 0.0][len(rest) :]
        weight = builder.replicated(weight) if weight is not None else None
        target = builder.replicated(target)
        args = (local, target, starts, split.size, reduction, ignore, builder.group, weight, smoothing)
        builder.emit(node, vocab_parallel_cross_entropy, args)
