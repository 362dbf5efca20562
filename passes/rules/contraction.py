"""contraction: products. Each op's rule is its einsum: ``linear: "... i, o i, o -> ... o"``.

An operand that is split along a letter of the result splits the result (column parallel, where the operand is a
weight). An operand that is split along a contracted letter makes the result a partial sum (row parallel).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from passes import ops
from passes.graphs import is_tensor, op_name, shape
from passes.layouts.facts import Facts, without
from passes.layouts.layout import Layout, Shards
from passes.layouts.units import Factor, Value
from passes.rules.alignment import Alignment, Key, align, as_value, combine, keyed_factors
from passes.rules.base import Rule, register
from passes.rules.builder import Builder

__all__ = ["MOVES", "Contraction", "contract"]

aten = torch.ops.aten
MOVES = {"aten.t", "aten.transpose", "aten.permute", "aten.numpy_T", "aten.reshape", "aten.to", "aten.slice",
          "aten.unsqueeze", "aten.squeeze"}  # fmt: skip


def is_weight(node: fx.Node) -> bool:
    """Whether a value is a parameter, or a view of one."""
    while op_name(node) in MOVES:
        node = node.args[0]
    return node.op == "get_attr" and bool(node.meta.get("grad"))


def contract(
    node: fx.Node, values: list[Value], letters: list[list[str]], out: list[str], facts: Facts, keep: bool = True
) -> tuple[Alignment, Value] | None:
    """Label the result of a product, and record the labels over which it is a partial sum.

    Args:
        node: the product.
        values: its operands; one with only letters of the result may be a bias.
        letters: per operand, a letter for each dim.
        out: the result's letters.
        facts: the facts in which everything is recorded.
        keep: whether a sum over split labels may stay partial; if not, the labels are mixed.

    Returns:
        The alignment and the labelled result; None where dims cannot be aligned.
    """
    aligned = align(values, letters, out, facts.units)
    if aligned is None:
        return None
    alignment, refined = aligned
    summed = {key for key in alignment.sizes if key[0] not in out}
    across, inside = [], []
    for factors in keyed_factors(alignment, refined):
        for keys, labels in factors:
            summed_keys = [k for k in keys if k in summed]
            if not summed_keys:
                across.append((keys, labels))
                continue
            if len(summed_keys) == len(keys) and keep:
                inside.append((keys, labels))
                continue
            rest = facts.mix(node, Factor(tuple(range(len(keys))), labels), [keys.index(k) for k in summed_keys])
            if rest is not None:  # the summed labels are needed with those of the result
                across.append((tuple(keys[i] for i in rest.dims), rest.labels))
                inside.append((keys, labels))
    pending = [f for f in inside if set(f[0]) <= summed]
    combine(inside, facts.units, across=summed)
    combined = combine(across, facts.units, across=alignment.sizes)
    facts.pending[node] = [labels for _, labels in pending]
    facts.work[node] = (tuple(alignment.sizes.values()), [labels for _, labels in combined + pending])
    return alignment, as_value(alignment, combined)


class Contraction(Rule):
    """A product that is an einsum over its tensor operands in order."""

    def equation(self, node: fx.Node) -> tuple[list[fx.Node], list[list[str]], list[str]] | None:
        """The operands, their letters and the result's letters; None where the op is no plain einsum."""
        raise NotImplementedError

    def bias(self, node: fx.Node) -> Any:
        """The operand that is added to the product, if any."""
        return None

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        equation = self.equation(node)
        operands = [n for n in node.all_input_nodes if is_tensor(n)]
        if equation is not None:
            operands, letters, out = equation
            product = contract(node, [facts.values[n] for n in operands], letters, out, facts)
            if product is not None:
                facts.alignments[node] = (product[0], operands)
                return product[1]
        facts.opaque(node, operands)
        return facts.units.labelled(shape(node))

    def shard(self, node: fx.Node, builder: Builder) -> None:
        if node not in builder.facts.alignments:
            builder.copy(node)
            return
        alignment, operands = builder.facts.alignments[node]
        weights = [n for n in operands if is_weight(n) and n is not self.bias(node)]
        if not builder.layout(node).whole:
            keys = builder.out_keys(node, alignment)
            layouts = [builder.operand_layout(n, alignment, i, keys) for i, n in enumerate(operands)]
            if keys and all(w is not None for w in layouts):
                local = {id(n): builder.local(n, w) for n, w in zip(operands, layouts, strict=True) if w is not None}
                column = any(not w.whole for n, w in zip(operands, layouts, strict=True) if n in weights and w)
                target = ops.COLUMN_PARALLEL.get(op_name(node)) if column else None
                self._emit(node, target or node.target, local, builder, layout=builder.layout(node))
                return
        keys = self._split_sum(node, alignment, operands, builder)
        if keys:
            layouts = [builder.operand_layout(n, alignment, i, keys) for i, n in enumerate(operands)]
            if all(w is not None for w in layouts):
                factors = [(n, w) for n, w in zip(operands, layouts, strict=True) if w and n is not self.bias(node)]
                local = {id(n): builder.local(n, w) for n, w in factors}
                row = ops.ROW_PARALLEL.get(op_name(node)) if weights else None
                self._emit_pending(node, row, local, builder)
                return
        builder.copy(node)

    @staticmethod
    def _split_sum(node: fx.Node, alignment: Alignment, operands: list[fx.Node], builder: Builder) -> dict[Key, Shards]:
        """The shards of contracted letters, as the plan splits an operand along them, with each index on one rank.

        Returns:
            The shards by key; none if no operand is split along contracted letters only.
        """
        out = set(alignment.out[1])
        for i, operand in enumerate(operands):
            axes, names = alignment.operands[i]
            layout = builder.relayout(builder.layout(operand), builder.value(operand).axes, axes)
            if layout is None or layout.whole or any(names[v] in out for v, _ in layout.shards):
                continue
            owned = builder.owned(layout, axes)
            if owned is not None:
                return {names[v]: s for v, s in owned.shards}
        return {}

    def _emit(self, node: fx.Node, target: Any, local: dict[int, fx.Node], builder: Builder, layout: Layout) -> None:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: local.get(id(n)) or builder.argument(n))
        builder.emit(node, target, args, kwargs, layout=layout)

    def _emit_pending(self, node: fx.Node, target: Any, local: dict[int, fx.Node], builder: Builder) -> None:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: local.get(id(n)) or builder.argument(n))
        builder.emit(node, target or node.target, args, kwargs, pending=True)


@register("aten.linear")
class Linear(Contraction):
    """``"... i, o i, o -> ... o"``"""

    def equation(self, node: fx.Node) -> tuple[list[fx.Node], list[list[str]], list[str]] | None:
        x, weight, *bias = node.args
        lead = [f"b{i}" for i in range(len(shape(x)) - 1)]
        bias = [b for b in bias if b is not None]
        return [x, weight, *bias], [[*lead, "i"], ["o", "i"], *([["o"]] * len(bias))], [*lead, "o"]

    def bias(self, node: fx.Node) -> Any:
        return node.args[2] if len(node.args) > 2 else None

    def _emit_pending(self, node: fx.Node, target: Any, local: dict[int, fx.Node], builder: Builder) -> None:
        x, weight = (local[id(n)] for n in node.args[:2])
        bias = self.bias(node)
        addend = builder.replicated(bias) if bias is not None else None
        builder.emit(node, target or node.target, (x, weight), pending=True, addend=addend)


@register("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot")
class Matmul(Contraction):
    """``"... m k, ... k n -> ... m n"``, either operand a vector too."""

    def equation(self, node: fx.Node) -> tuple[list[fx.Node], list[list[str]], list[str]] | None:
        left, right = node.args
        a, b, out = len(shape(left)), len(shape(right)), len(shape(node))
        batch = out - (a > 1) - (b > 1)
        lead = [f"b{i}" for i in range(batch)]
        la = (lead[batch - (a - 2) :] + ["m", "k"]) if a > 1 else ["k"]
        lb = (lead[batch - (b - 2) :] + ["k", "n"]) if b > 1 else ["k"]
        return [left, right], [la, lb], lead + ["m"] * (a > 1) + ["n"] * (b > 1)


@register("aten.linalg_solve_triangular")
class TriangularSolve(Contraction):
    """``"... i j, ... j k -> ... i k"``, or ``"... k i, ... i j -> ... k j"`` from the right.

    The system's own dims are never split: each row's solution depends on other rows.
    """

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        system, right = node.args
        ranks = [len(shape(n)) - 2 for n in (system, right)]
        lead = [[f"b{i}" for i in range(max(ranks) - rank, max(ranks))] for rank in ranks]
        left = node.kwargs.get("left", True)
        letters = [[*lead[0], "i", "j"], [*lead[1], *("jk" if left else "ki")]]
        out = [*max(lead, key=len), *("ik" if left else "kj")]
        inner = [[d for d, x in enumerate(names) if x in "ij"] for names in letters]
        values = [without(node, facts.values[n], dims, facts) for n, dims in zip((system, right), inner, strict=True)]
        product = contract(node, values, letters, out, facts)
        if product is None:
            facts.opaque(node, [system, right])
            return facts.units.labelled(shape(node))
        facts.alignments[node] = product[0], [system, right]
        return product[1]


@register("aten.addmm", "aten.baddbmm")
class AddMatmul(Contraction):
    """``"n, m k, k n -> m n"``: ``beta * input + alpha * (left @ right)``."""

    def equation(self, node: fx.Node) -> tuple[list[fx.Node], list[list[str]], list[str]] | None:
        bias, left, right = node.args
        out = ["b", "m", "n"][3 - len(shape(node)) :]
        lead = out[:-2]
        return [bias, left, right], [out[len(out) - len(shape(bias)) :], [*lead, "m", "k"], [*lead, "k", "n"]], out

    def bias(self, node: fx.Node) -> Any:
        return node.args[0]

    def _emit_pending(self, node: fx.Node, target: Any, local: dict[int, fx.Node], builder: Builder) -> None:
        bias, left, right = node.args
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        value = builder.value(node)
        product = aten.bmm.default if len(shape(node)) == 3 else aten.mm.default
        target = target or product
        total = builder.call(target, (local[id(left)], local[id(right)]), state="pending", value=value)
        if alpha != 1:
            total = builder.call(aten.mul.Tensor, (total, alpha), state="pending", value=value)
        addend = None
        if beta != 0:
            addend = builder.replicated(bias)
            if beta != 1:
                scaled = builder.value(bias)
                addend = builder.call(aten.mul.Tensor, (addend, beta), state="whole", value=scaled, shaped=False)
        builder.record(node, total, pending=True, addend=addend)


@register("aten.einsum")
class Einsum(Contraction):
    """The rule's equation is the op's own equation."""

    def equation(self, node: fx.Node) -> tuple[list[fx.Node], list[list[str]], list[str]] | None:
        text, operands = node.args[0].replace(" ", ""), list(node.args[1])
        inputs, arrow, out = text.partition("->")
        terms = inputs.split(",")
        if not arrow:
            letters = sorted(set(re.sub(r"[^A-Za-z]", "", inputs)))
            out = ("..." if "..." in inputs else "") + "".join(x for x in letters if inputs.count(x) == 1)
        rest = [len(shape(n)) - len(t.replace("...", "")) for n, t in zip(operands, terms, strict=True)]
        most = max(rest)

        def names(term: str, dots: int) -> list[str]:
            """The letters of a term, with names for the ``dots`` dims that its dots stand for."""
            before, _, after = term.partition("...")
            return [*before, *(f"b{i}" for i in range(most - dots, most)), *after] if "..." in term else list(term)

        letters_of_terms = [names(t, r) for t, r in zip(terms, rest, strict=True)]
        if any(len(set(x)) < len(x) for x in letters_of_terms):  # a diagonal
            return None
        return operands, letters_of_terms, names(out, most)
