"""fold: what computes nothing on this rank is gone, and what is the same in every call is computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.deduplicate import is_pure
from passes.lowering.local_values import cut, is_tensor, local, numel, remove_dead_code

__all__ = ["fold"]

_NEUTRAL = {"aten.mul": 1, "aten.div": 1, "aten.add": 0, "aten.sub": 0, "aten.pow": 1}
_SHAPING = {"aten.expand", "aten.reshape", "aten.view", "aten.contiguous", "aten.clone", "aten.alias", "aten.to",
            "aten._to_copy", "aten.detach", "aten.slice"}  # fmt: skip
_LARGEST = 1 << 20
"""Elements of a constant that is worth keeping."""


def _is_neutral(node: fx.Node) -> bool:
    """Whether a node adds zero, or multiplies by one."""
    name = op_name(node)
    if name not in _NEUTRAL or len(node.args) != 2 or node.kwargs:
        return False
    (x, number) = node.args
    return isinstance(number, (int, float)) and number == _NEUTRAL[name] and is_tensor(x)


def _changes_no_shape(node: fx.Node) -> bool:
    """Whether a node that could change a shape or a dtype leaves both."""
    name = op_name(node)
    if name not in _SHAPING:
        return False
    if name == "aten.slice":
        _, _, start, _, step = cut(node)
        return start == 0 and step == 1
    return name != "aten.detach" or not node.args[0].meta.get("grad", True)


def _source(node: fx.Node) -> fx.Node | None:
    """What a node gives unchanged, if it does so."""
    if not (_is_neutral(node) or _changes_no_shape(node)) or not is_tensor(node):
        return None
    source = node.args[0]
    if not is_tensor(source) or local(source) != local(node):
        return None
    if "device" in node.kwargs or any(isinstance(a, torch.device) for a in node.args):
        return None
    held = source.op in ("placeholder", "get_attr")
    return None if held and any(u.op == "output" for u in node.users) else source  # a copy of what the caller holds


def _is_constant(node: fx.Node, constants: dict[str, Any]) -> bool:
    if node.op == "get_attr":
        return node.target in constants
    if node.op != "call_function" or not is_tensor(node) or not is_pure(node):
        return False
    size = numel(local(node).shape)
    return size is not None and size <= _LARGEST and not any(u.op == "output" for u in node.users)


def _evaluate(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> None:
    """Compute what depends on nothing that a call is given, nor on the model's weights."""
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
    """Take out sums with zero, products with one, casts, slices and expansions to what a value is already, and
    compute what is the same in every call.

    Args:
        graph: a rank's graph; changed in place.
        constants: tensors that the graph has, by ``get_attr`` target; what is computed here is added.

    Returns:
        How many nodes went.
    """
    before = len(graph.nodes)
    for node in list(graph.nodes):
        if node.op == "call_function" and (source := _source(node)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    _evaluate(graph, constants)
    remove_dead_code(graph)
    return before - len(graph.nodes)
