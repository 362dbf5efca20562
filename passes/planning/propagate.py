"""propagate: find the indices that must stay together: the units of all values of a graph."""

from __future__ import annotations

from torch import fx

from passes.graphs import is_tensor, shape
from passes.layouts.axes import product
from passes.layouts.facts import Facts
from passes.layouts.units import Value
from passes.rules import rule_of

__all__ = ["propagate"]


def _keep_together(node: fx.Node, facts: Facts) -> None:
    """Unite an input's labels along batch and sequence, where the capture fixed their sizes.

    Batch and sequence are taken to be all dims of an integer input; all but the last of a floating-point input of up
    to three dims; the first of any other (caches hold heads).
    """
    value = facts.values[node]
    rank = len(value.axes)
    leading = rank if not node.meta["val"].is_floating_point() else rank - 1 if rank <= 3 else 1
    for factor in value.factors:
        if factor.dims[0] < value.offset(leading):
            facts.mix(node, factor)


def propagate(graph: fx.Graph) -> Facts:
    """Label every static index of every value, and unite the labels that the ops tie together.

    Args:
        graph: a captured, simplified graph whose nodes carry ``meta["val"]`` and ``meta["grad"]``.

    Returns:
        The facts that planning and sharding rest on. The graph is not changed.
    """
    facts = Facts()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if is_tensor(node):
                facts.values[node] = facts.units.labelled(shape(node))
                if node.op == "placeholder":
                    _keep_together(node, facts)
            continue
        if node.op == "output":
            slots = node.meta.get("slots", {})  # results that may stay split between calls
            returned = [n for i, n in enumerate(node.args[0]) if i not in slots]
            facts.opaque(node, [n for n in dict.fromkeys(returned) if is_tensor(n)])
            continue
        value = rule_of(node).propagate(node, facts)
        if is_tensor(node):
            sizes = tuple(product(dim) for dim in value.axes)
            assert len(sizes) == len(shape(node)), (node, value.axes, shape(node))
            assert all(a == b or not (a.static and b.static) for a, b in zip(sizes, shape(node), strict=True)), (
                node, value.axes, shape(node))  # fmt: skip
            factors = tuple(f for f in value.factors if f.labels.size)  # a value of no elements has nothing to split
            facts.values[node] = value if len(factors) == len(value.factors) else Value(value.axes, factors)
    return facts
