"""convolution: products that vary along a dim: convolutions, and products with another matrix for each run of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from passes.graphs import is_tensor, shape
from passes.layouts.axes import trivial_axes
from passes.layouts.facts import Facts, without
from passes.layouts.layout import Layout
from passes.layouts.units import Value
from passes.rules.base import register
from passes.rules.builder import Builder
from passes.rules.contraction import Contraction, contract

__all__ = ["Convolution", "GroupedMatmul"]

aten = torch.ops.aten


@register("aten.conv1d", "aten.conv2d", "aten.conv3d")
class Convolution(Contraction):
    """``"b i s, o i k, o -> b o t"``; with a group for each channel (depthwise) ``"b c s, c 1 k, c -> b c t"``.

    Positions are never split.
    """

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        x, weight, bias = node.args[0], node.args[1], self.bias(node)
        operands = [n for n in (x, weight, bias) if n is not None]
        out, spatial, depthwise = shape(node), len(shape(weight)) - 2, self.depthwise(node)
        batch = ["b"] * (len(out) - spatial - 1)
        positions, kernel, out_positions = ([f"{letter}{i}" for i in range(spatial)] for letter in "skt")
        inner, outer, weight_inner = ("c", "c", "one") if depthwise else ("i", "o", "i")
        letters = [[*batch, inner, *positions], [outer, weight_inner, *kernel], [outer]][: len(operands)]
        out_letters = [*batch, outer, *out_positions]
        product = None
        if depthwise or self.groups(node) == 1:
            values = [facts.values[n] for n in operands]
            for k, value in enumerate(values[:2]):  # positions and the kernel's extent
                values[k] = without(node, value, range(len(value.axes) - spatial, len(value.axes)), facts)
            product = contract(node, values, letters, out_letters, facts)
        if product is None:
            facts.opaque(node, operands)
            return facts.units.labelled(out)
        alignment, value = product
        axes = alignment.out[0][:-spatial] + trivial_axes(out)[-spatial:]
        keys = tuple((letter, k) for letter, dim in zip(out_letters, axes, strict=True) for k in range(len(dim)))
        facts.alignments[node] = replace(alignment, out=(axes, keys)), operands
        return Value(axes, value.factors)

    @staticmethod
    def groups(node: fx.Node) -> int:
        """The number of groups of channels."""
        return int(node.args[6]) if len(node.args) > 6 else 1

    def depthwise(self, node: fx.Node) -> bool:
        """Whether each channel is convolved by itself."""
        outer, inner, *_ = shape(node.args[1])
        return inner.is_one and outer.static and outer.number == self.groups(node) > 1

    def bias(self, node: fx.Node) -> Any:
        return node.args[2] if len(node.args) > 2 else None

    def _emit(self, node: fx.Node, target: Any, local: dict[int, fx.Node], builder: Builder, layout: Layout) -> None:
        args = list(fx.map_arg(node.args, lambda n: local.get(id(n)) or builder.argument(n)))
        if self.depthwise(node):
            channels = len(shape(node)) - len(shape(node.args[1])) + 1
            (args[6],) = builder.local_sizes(node, [args[6]], channels)
        builder.emit(node, node.target, tuple(args), dict(node.kwargs), layout=layout)

    def _emit_pending(self, node: fx.Node, target: Any, local: dict[int, fx.Node], builder: Builder) -> None:
        bias, addend = self.bias(node), None
        if bias is not None:
            reshape = (builder.replicated(bias), [-1, *[1] * (len(shape(node.args[1])) - 2)])
            addend = builder.call(aten.reshape.default, reshape, state="whole", value=builder.value(node))
        args = (*(local[id(n)] for n in node.args[:2]), None, *node.args[3:])
        builder.emit(node, node.target, args, dict(node.kwargs), pending=True, addend=addend)


@register("aten._grouped_mm", "transformers.grouped_mm_fallback")
class GroupedMatmul(Contraction):
    """``"t k, e k n -> t n"``: runs of rows, each with a matrix of its own; the ends of runs are replicated."""

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        rows, matrices, *rest = (n for n in node.all_input_nodes if is_tensor(n))
        facts.opaque(node, rest)
        product = None
        if len(shape(rows)) == 2 and len(shape(matrices)) == 3:
            left, right = (without(node, facts.values[n], [0], facts) for n in (rows, matrices))
            product = contract(node, [left, right], [["t", "k"], ["e", "k", "n"]], ["t", "n"], facts)
        if product is None:
            facts.opaque(node, [rows, matrices])
            return facts.units.labelled(shape(node))
        alignment, value = product
        sizes = tuple(size for (letter, _), size in alignment.sizes.items() if letter != "e")
        facts.work[node] = (sizes, facts.work[node][1])
        facts.alignments[node] = alignment, [rows, matrices]
        return value
