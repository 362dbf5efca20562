"""pointwise: ops that compute each index from the same index of their inputs, ``"..., ... -> ..."``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.graphs import is_tensor, op_name, shape
from passes.layouts.facts import Facts
from passes.layouts.units import Value
from passes.rules.alignment import align, as_value, combine, keyed_factors
from passes.rules.base import Rule, register
from passes.rules.builder import Builder

__all__ = ["Pointwise"]

aten = torch.ops.aten


def broadcast_letters(dim_counts: list[int], out_dims: int) -> list[list[str]]:
    """Letters that align operands with these numbers of dims from the right."""
    names = [f"d{i}" for i in range(out_dims)]
    return [names[out_dims - n :] for n in dim_counts]


@register("aten.to", "aten._to_copy", "aten.__and__", "aten.__or__", "aten.__xor__", "aten.type_as", "aten.clone",
          "aten.contiguous", "aten.detach", "aten.alias", "aten.masked_fill", "aten.zeros_like", "aten.ones_like",
          "aten.full_like", "aten.empty_like", "aten.float_power", "aten.square", "aten.rsub", "aten.lift_fresh_copy",
          "aten.relu6", "aten.selu", "aten.gelu", "aten.log_sigmoid", "aten.softplus", "aten.hardswish", "aten.mish",
          "aten.logical_and", "aten.logical_not", "aten.where", "aten.nan_to_num", "aten.clamp",
          "aten.clip", "aten.leaky_relu")  # fmt: skip
class Pointwise(Rule):
    """Equal indices are united; an input that broadcasts serves all indices that it is broadcast to."""

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        operands = [n for n in node.all_input_nodes if is_tensor(n)]
        if node.target in (aten.type_as.default, aten.to.other):  # the other one gives its dtype only
            operands = operands[:1]
        out = shape(node)
        values = [facts.values[n] for n in operands]
        letters = broadcast_letters([len(v.axes) for v in values], len(out))
        aligned = align(values, letters, [f"d{i}" for i in range(len(out))], facts.units) if operands else None
        if aligned is None:
            facts.opaque(node, operands)
            return facts.units.labelled(out)
        alignment, refined = aligned
        facts.alignments[node] = (alignment, operands)
        factors = [f for keyed in keyed_factors(alignment, refined) for f in keyed]
        return as_value(alignment, combine(factors, facts.units))

    def shard(self, node: fx.Node, builder: Builder) -> None:
        if self._emit_partial_sum(node, builder):
            return
        local = self.local_operands(node, builder)
        if local is None:
            builder.copy(node)
            return
        args, kwargs = fx.map_arg(
            (node.args, dict(node.kwargs)), lambda n: local[n] if n in local else builder.argument(n)
        )
        self.emit_local(node, args, kwargs, builder)

    def emit_local(self, node: fx.Node, args: Any, kwargs: Any, builder: Builder) -> None:
        """Emit the op on local operands."""
        builder.emit(node, node.target, args, kwargs, layout=builder.layout(node))

    @staticmethod
    def local_operands(node: fx.Node, builder: Builder) -> dict[fx.Node, fx.Node] | None:
        """The operands in the layouts that match the result's layout; None where the result is replicated."""
        if builder.layout(node).whole or node not in builder.facts.alignments:
            return None
        alignment, operands = builder.facts.alignments[node]
        keys = builder.out_keys(node, alignment)
        layouts = [builder.operand_layout(n, alignment, i, keys) for i, n in enumerate(operands)]
        if not keys or any(w is None for w in layouts):
            return None
        return {n: builder.local(n, w) for n, w in zip(operands, layouts, strict=True) if w is not None}

    @classmethod
    def _emit_partial_sum(cls, node: fx.Node, builder: Builder) -> bool:
        """Emit an op on partial sums whose result is a partial sum again; returns whether it is one."""
        name, args = op_name(node), node.args
        if name in ("aten.add", "aten.sub") and len(args) == 2 and not node.kwargs:
            sums = [a for a in args if builder.is_partial_sum(a)]
            same = any(shape(a) == shape(node) for a in sums)  # a smaller sum broadcasts to the larger
            types = {a.meta["val"].dtype if is_tensor(a) else None for a in args}
            if not sums or not same or len(types) != 1:
                return False
            cls._emit_sum(node, builder)
            return True
        if name in ("aten.mul", "aten.div", "aten.neg") and args and builder.is_partial_sum(args[0]):
            if any(is_tensor(a) for a in args[1:]) or node.kwargs:
                return False
            cls._emit_multiple(node, builder)
            return True
        return False

    @staticmethod
    def _emit_sum(node: fx.Node, builder: Builder) -> None:
        """Emit the sum, or difference, of two partial sums, or of one and a replicated value."""
        left, right = node.args
        value = builder.value(node)

        def combined(a: fx.Node | None, b: fx.Node | None, state: str) -> fx.Node | None:
            """The sum, or difference, of two rewritten nodes, either of which may be None."""
            if a is not None and b is not None:
                return builder.call(node.target, (a, b), state=state, value=value, shaped=state == "pending")
            if b is not None and op_name(node) == "aten.sub":
                return builder.call(aten.neg.default, (b,), state=state, value=value, shaped=state == "pending")
            return a if a is not None else b

        first, second = (builder.states[a] if builder.is_partial_sum(a) else None for a in (left, right))
        total = combined(first and first.node, second and second.node, "pending")
        addend = combined(
            first.addend if first else builder.replicated(left),
            second.addend if second else builder.replicated(right),
            "whole",
        )
        assert total is not None
        builder.record(node, total, pending=True, addend=addend)

    @staticmethod
    def _emit_multiple(node: fx.Node, builder: Builder) -> None:
        """Emit the multiple of a partial sum by a number."""
        state, value, rest = builder.states[node.args[0]], builder.value(node), builder.arguments(node.args[1:])
        addend = state.addend and builder.call(
            node.target, (state.addend, *rest), state="whole", value=value, shaped=False
        )
        total = builder.call(node.target, (state.node, *rest), state="pending", value=value)
        builder.record(node, total, pending=True, addend=addend)
