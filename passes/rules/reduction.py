"""reduction: reductions and scans over dims: sums stay partial sums, all others mix the dims that they reduce."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from passes.graphs import is_last, op_name, shape
from passes.layouts.facts import Facts
from passes.layouts.layout import Layout
from passes.layouts.units import Factor, Value
from passes.rules.base import Rule, register
from passes.rules.builder import Builder

__all__ = ["Reduction", "Scan", "Sum"]

aten = torch.ops.aten


def dims_of(node: fx.Node, position: int = 1) -> list[int]:
    """The dims of a reduction; all dims where it names none."""
    rank = len(shape(node.args[0]))
    dims = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if dims is None or dims == [] or isinstance(dims, bool):  # ``var(unbiased)`` names no dims
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if rank else []


def reduced(value: Value, dims: list[int], keep: bool, factors: list[Factor]) -> Value:
    """The labelled result of a reduction.

    Args:
        value: the labelled input.
        dims: the reduced dims.
        keep: whether they stay, with size one.
        factors: the factors that remain, on the input's virtual dims.
    """
    inside = {v for d in dims for v in value.virtual(d)}
    remaining = [v for v in range(len(value.sizes)) if v not in inside]
    new_dims = {v: new for new, v in enumerate(remaining)}
    axes = tuple(() if d in dims else a for d, a in enumerate(value.axes) if keep or d not in dims)
    return Value(axes, tuple(Factor(tuple(new_dims[v] for v in f.dims), f.labels) for f in factors))


_OF_LOGITS = {"aten.softmax", "aten.log_softmax", "aten.logsumexp", "aten.argmax", "max_values", "max_indices"}


def of_logits(node: fx.Node, value: Value, inside: set[int], facts: Facts) -> bool:
    """Whether an op mixes logits at the end of a model; if so, records that it needs them replicated.

    Gathering the logits costs less than a head that is unsplit on every rank. Logits have labels on the mixed
    (virtual) dims only.
    """
    only_mixed = value.factors and all(set(f.dims) <= inside for f in value.factors)
    if op_name(node) not in _OF_LOGITS or not only_mixed or not is_last(node):
        return False
    facts.opaque(node, [node.args[0]])
    return True


@register("aten.amax", "aten.amin", "aten.prod", "aten.var", "aten.std", "aten.argmax", "aten.argmin", "aten.any",
          "aten.all", "aten.logsumexp", "aten.norm", "aten.linalg_vector_norm", "aten.median",
          "aten.count_nonzero", "max_values", "max_indices", "min_values", "min_indices")  # fmt: skip
class Reduction(Rule):
    """A reduction that mixes the dims it reduces; the other dims pass through."""

    sums = False
    position = 1

    def keeps(self, node: fx.Node) -> bool:
        """Whether reduced dims stay, with size one."""
        return len(shape(node)) == len(shape(node.args[0]))

    def dims(self, node: fx.Node) -> list[int]:
        """The reduced dims."""
        position = 2 if op_name(node) in ("aten.norm", "aten.linalg_vector_norm") else self.position
        return dims_of(node, position)

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        value, dims = facts.values[node.args[0]], self.dims(node)
        inside = {v for d in dims for v in value.virtual(d)}
        remaining, pending = [], []
        if of_logits(node, value, inside, facts):
            return reduced(value, dims, self.keeps(node), [])
        for factor in value.factors:
            if not inside & set(factor.dims):
                remaining.append(factor)
            elif set(factor.dims) <= inside and self.sums:
                pending.append(factor.labels)
            else:
                rest = facts.mix(node, factor, [v for v in factor.dims if v in inside])
                if rest is not None:
                    remaining.append(rest)
        facts.pending[node] = pending
        return reduced(value, dims, self.keeps(node), remaining)

    def shard(self, node: fx.Node, builder: Builder) -> None:
        source, layout = node.args[0], builder.layout(node)
        value, dims = builder.value(source), self.dims(node)
        source_layout = builder.layout(source)
        shards, inside = source_layout.shards, {v for d in dims for v in value.virtual(d)}
        if not (layout.whole or source_layout.whole or any(v in inside for v, _ in shards)):
            self.emit_split(node, builder.local(source, source_layout), builder, layout)
        elif self.sums and layout.whole and not source_layout.whole and all(v in inside for v, _ in shards):
            owned = builder.owned(source_layout, value.axes)
            if owned is not None:
                self.emit_sum(node, builder.local(source, owned), builder)
            elif len(shards) == 1 and (replicas := shards[0][1].replicas) is not None:
                first = {group[0] for group in replicas}  # of the ranks that hold the same shard one counts it
                times = [int(r in first) for r in range(builder.tp)]
                self.emit_sum(node, builder.local(source, source_layout), builder, times)
            else:
                builder.copy(node)
        else:
            builder.copy(node)

    def emit_split(self, node: fx.Node, local: fx.Node, builder: Builder, layout: Layout) -> None:
        """Emit the reduction over dims that are not split."""
        args, kwargs = builder.arguments((node.args[1:], dict(node.kwargs)))
        builder.emit(node, node.target, (local, *args), kwargs, layout=layout)

    def emit_sum(self, node: fx.Node, local: fx.Node, builder: Builder, times: Sequence[int] | None = None) -> None:
        """Emit the rank's summand of a partial sum, multiplied by ``times[rank]``."""
        raise NotImplementedError


@register("aten.sum", "aten.mean")
class Sum(Reduction):
    """``"... i -> ..."``: a partial sum where the summed dim is split; a mean divides by the global count."""

    sums = True

    def emit_sum(self, node: fx.Node, local: fx.Node, builder: Builder, times: Sequence[int] | None = None) -> None:
        dims, keep = self.dims(node), self.keeps(node)
        kwargs = {"dtype": node.kwargs["dtype"]} if node.kwargs.get("dtype") is not None else {}
        value = builder.value(node)
        total = builder.call(aten.sum.dim_IntList, (local, dims, keep), kwargs, state="pending", value=value)
        if times is not None:
            total = builder.call(aten.mul.Tensor, (total, builder.per_rank(times)), state="pending", value=value)
        if op_name(node) == "aten.mean":
            source = node.args[0]
            sizes = {d: source.meta["val"].shape[d] for d in dims}
            counts = [math.prod(s for s in sizes.values() if isinstance(s, int))]
            counts += [builder.extent(source, d) for d, s in sizes.items() if not isinstance(s, int)]
            for count in counts:
                total = builder.call(aten.div.Tensor, (total, count), state="pending", value=value)
        builder.record(node, total, pending=True)


@register("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.cumsum", "aten.cumprod",
          "aten.logcumsumexp", "aten.tril", "aten.triu")  # fmt: skip
class Scan(Rule):
    """An op that keeps its input's shape and mixes along one dim, or along both dims of a matrix."""

    @staticmethod
    def _dims(node: fx.Node) -> list[int]:
        """The mixed dims."""
        rank = len(shape(node))
        return [rank - 2, rank - 1] if op_name(node) in ("aten.tril", "aten.triu") else dims_of(node)

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        value = facts.values[node.args[0]]
        inside = {v for d in self._dims(node) for v in value.virtual(d)}
        if of_logits(node, value, inside, facts):
            return Value(value.axes)
        for factor in value.factors:
            if inside & set(factor.dims):
                facts.mix(node, factor, [v for v in factor.dims if v in inside])
        return value

    def shard(self, node: fx.Node, builder: Builder) -> None:
        source, layout = node.args[0], builder.layout(node)
        value = builder.value(source)
        inside = {v for d in self._dims(node) for v in value.virtual(d)}
        if layout.whole or any(v in inside for v, _ in layout.shards):
            builder.copy(node)
            return
        local = builder.local(source, layout)
        args, kwargs = builder.arguments((node.args[1:], dict(node.kwargs)))
        builder.emit(node, node.target, (local, *args), kwargs, layout=layout)
