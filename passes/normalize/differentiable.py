"""differentiable: mark the nodes through which gradients flow."""

from __future__ import annotations

from torch import fx

from passes.graphs import is_tensor, op_name

__all__ = ["differentiable"]

_STOPS = {"aten.detach", "aten.detach_", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.new_zeros",
          "aten.new_ones", "aten.new_full", "aten.new_empty", "aten.empty_like", "aten.argmax", "aten.sign",
          "aten.round", "aten.floor", "aten.ceil"}  # fmt: skip


def differentiable(graph: fx.Graph, parameters: set[str]) -> int:
    """Set ``meta["grad"]`` on every node: whether a gradient can reach it.

    A floating-point input or parameter counts whatever its ``requires_grad`` says now, because that may change
    after capture. Buffers and constants never count.

    Args:
        graph: a captured graph whose nodes carry ``meta["val"]``.
        parameters: the ``get_attr`` targets that are parameters.

    Returns:
        The number of nodes that were marked true.
    """
    count = 0
    for node in graph.nodes:
        value = node.meta.get("val")
        floating = is_tensor(node) and (value.is_floating_point() or value.is_complex())
        if node.op == "placeholder":
            grad = floating
        elif node.op == "get_attr":
            grad = floating and node.target in parameters
        else:
            grad = op_name(node) not in _STOPS and any(n.meta.get("grad", False) for n in node.all_input_nodes)
            grad = grad and (floating or isinstance(value, (tuple, list)))
        node.meta["grad"] = bool(grad)
        count += node.meta["grad"]
    return count
