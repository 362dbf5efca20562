"""graphs: small helpers on fx graphs that every pass shares: values, op names, the origin of a node."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from passes.layouts.axes import Size, shape_of

__all__ = ["is_last", "is_random", "is_tensor", "module_path", "op_name", "shape", "source_line", "where"]

_CAPTURES = str(Path(__file__).parents[1] / "autotp") + os.sep


def op_name(node: fx.Node) -> str:
    """The name of the op that a node calls, without overload (``aten.add``), or of another callable; else ``""``."""
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return getattr(target, "__name__", str(target))


def is_tensor(node: Any) -> bool:
    """Whether an argument is a node whose value is a tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape(node: fx.Node) -> tuple[Size, ...]:
    """The global sizes of a tensor node's dims."""
    return shape_of(node.meta["val"])


def levels(graph: fx.Graph, steps: Callable[[fx.Node], bool]) -> dict[fx.Node, int]:
    """Per node, the largest number of nodes with ``steps`` on any path to it, itself included."""
    result: dict[fx.Node, int] = {}
    for node in graph.nodes:
        result[node] = max((result[n] for n in node.all_input_nodes), default=0) + steps(node)
    return result


def ends(graph: fx.Graph, through: Callable[[fx.Node], bool], at: Callable[[fx.Node], bool]) -> dict[fx.Node, fx.Node]:
    """Per node, the last node with ``at`` that a path of nodes with ``through`` leads to; itself if there is none."""
    result: dict[fx.Node, fx.Node] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in reversed(graph.nodes):
        reached = [result[u] if through(u) and not at(u) else u for u in node.users if at(u) or through(u)]
        result[node] = max((n for n in reached if at(n)), key=order.__getitem__, default=node)
    return result


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers, itself or in a region that it runs (capture marks those)."""
    target = node.target
    seeded = isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    if seeded:  # attention has the tag because of its dropout
        names = [a.name for a in target._schema.arguments]
        arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
        seeded = "dropout_p" not in names or bool(arguments.get("dropout_p", 0.0))
    return seeded or bool(node.meta.get("random"))


def module_path(node: fx.Node) -> str:
    """The qualified name of the innermost module that the node was captured in (``""``: the root)."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    return "" if path.startswith("_empty") else re.sub(r"@\d+$", "", path)  # torch's mark for no module


def source_line(node: fx.Node) -> str:
    """``path:line`` of the model's code that made the node: the innermost frame outside of torch and autotp."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    frames = [f for f in frames if not f[0].startswith(_CAPTURES)]
    own = [f for f in frames if "/torch/" not in f[0]] or frames
    return "{}:{}".format(*own[-1]) if own else "unknown source line"


def where(node: fx.Node) -> str:
    """A phrase that tells a person which node it is: its op, module path and source line."""
    path = module_path(node)
    op = op_name(node).removeprefix("aten.") or node.name
    return f"{op} in {path or 'the model'} ({source_line(node).rpartition('/')[2]})"


def is_last(node: fx.Node) -> bool:
    """Whether no weight is applied downstream of a node, as for logits and values computed from them."""
    seen, pending = {node}, [node]
    while pending:
        for user in pending.pop().users:
            if any(n.op == "get_attr" and n.meta.get("grad") for n in user.all_input_nodes):
                return False
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return True
