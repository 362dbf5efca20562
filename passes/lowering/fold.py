"""fold: remove the ops that are no-ops on this rank, and compute once the values that are the same in every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.deduplicate import is_pure
from passes.lowering.local_values import is_tensor, local, numel, remove_dead_code, slice_arguments

__all__ = ["fold"]

_NEUTRAL = {"aten.mul": 1, "aten.div": 1, "aten.add": 0, "aten.sub": 0, "aten.pow": 1}
_SHAPING = {"aten.expand", "aten.reshape", "aten.view", "aten.contiguous", "aten.clone", "aten.alias", "aten.to",
            "aten._to_copy", "aten.detach", "aten.slice"}  # fmt: skip
_LARGEST = 1 << 20
"""The most elements of a constant that is worth its memory."""


def _is_neutral(node: fx.Node) -> bool:
    """Whether a node adds zero, multiplies by one, or does the like."""
    name = op_name(node)
    if name not in _NEUTRAL or len(node.args) != 2 or node.kwargs:
        return False
    (x, number) = node.args
    return isinstance(number, (int, float)) and number == _NEUTRAL[name] and is_tensor(x)


def _keeps_shape(node: fx.Node) -> bool:
    """Whether a node changes at most a shape or a dtype, and no values."""
    name = op_name(node)
    if name not in _SHAPING:
        return False
    if name == "aten.slice":
        _, _, start, _, step = slice_arguments(node)
        return start == 0 and step == 1
    return name != "aten.detach" or not node.args[0].meta.get("grad", True)


def _unchanged_operand(node: fx.Node) -> fx.Node | None:
    """The operand that a node returns unchanged; None if it returns another value."""
    if not (_is_neutral(node) or _keeps_shape(node)) or not is_tensor(node):
        return None
    source = node.args[0]
    if not is_tensor(source) or local(source) != local(node):
        return None
    if "device" in node.kwargs or any(isinstance(a, torch.device) for a in node.args):
        return None
    is_input = source.op in ("placeholder", "get_attr")  # a result must not be the caller's own tensor
    return None if is_input and any(u.op == "output" for u in node.users) else source


def _is_constant(node: fx.Node, constants: dict[str, Any]) -> bool:
    """Whether a node's value is constant if its operands are, and small enough to be stored."""
    if node.op == "get_attr":
        return node.target in constants
    if node.op != "call_function" or not is_tensor(node) or not is_pure(node):
        return False
    size = numel(local(node).shape)
    return size is not None and size <= _LARGEST and not any(u.op == "output" for u in node.users)


def _evaluate(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> None:
    """Compute the values that depend neither on inputs nor on the model's weights."""
    values: dict[fx.Node, torch.Tensor] = {}
    for node in graph.nodes:
        if not _is_constant(node, constants) or any(n not in values for n in node.all_input_nodes):
            continue
        if node.op == "get_attr":
            values[node] = constants[str(node.target)]
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        if node.op == "get_attr" or value.is_meta or all(u in values for u in node.users):
            continue
        name = f"_folded_{len(constants)}"
        constants[name] = value
        with graph.inserting_before(node):
            new = graph.create_node("get_attr", name)
        new.meta = {**node.meta, "origin": name}
        node.replace_all_uses_with(new)


def fold(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> int:
    """Remove no-ops, and compute once the values that are the same in every call.

    No-ops are sums with zero, products with one, and casts, slices, reshapes and expansions that change nothing.

    Args:
        graph: a rank's graph; changed in place.
        constants: the graph's constant tensors, by ``get_attr`` target; new ones are added.

    Returns:
        The number of nodes that were removed.
    """
    before = len(graph.nodes)
    for node in list(graph.nodes):
        if node.op == "call_function" and (source := _unchanged_operand(node)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    _evaluate(graph, constants)
    remove_dead_code(graph)
    return before - len(graph.nodes)
