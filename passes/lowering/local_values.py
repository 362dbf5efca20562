"""local_values: the local shapes and dtypes of the values in a rank's graph, and helpers that insert nodes.

A lowered graph is one rank's, so every split size is a number. Sizes that differ from call to call are texts; equal
texts are equal sizes.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes import ops
from passes.graphs import op_name
from passes.ops.registry import COLLECTIVES

__all__ = [
    "Local",
    "Size",
    "call",
    "call_dense_ops",
    "describe",
    "is_tensor",
    "local",
    "numel",
    "remove_dead_code",
    "replace",
    "slice_arguments",
]

Size = int | str

aten = torch.ops.aten


@dataclass(frozen=True)
class Local:
    """A value's shape and dtype on this rank.

    Attributes:
        shape: the sizes; a text for one that differs from call to call.
        dtype: the dtype.
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype


def local(node: Any) -> Local:
    """The local shape and dtype of a tensor node."""
    value: Local = node.meta["local"]
    return value


def is_tensor(node: Any) -> bool:
    """Whether an argument is a node that stands for a tensor."""
    return isinstance(node, fx.Node) and node.meta.get("local") is not None


def numel(shape: Sequence[Size]) -> int | None:
    """The number of elements; None if it differs from call to call."""
    return math.prod(n for n in shape if isinstance(n, int)) if all(isinstance(n, int) for n in shape) else None


def _local_value(node: fx.Node, rank: int) -> Local | None:
    """A node's local shape and dtype, from its global value and its layout; None for one that is no tensor."""
    value, layout = node.meta.get("global"), node.meta.get("layout")
    if not isinstance(value, torch.Tensor) or node.meta.get("state") == "size":
        return None
    sizes: list[Size] = []
    layout_dims, virtual = layout.dims if layout is not None else {}, 0
    axes = node.meta.get("axes") or [()] * value.dim()
    for size, factors in zip(value.shape, axes, strict=True):
        shards = [layout_dims.get(v) for v in range(virtual, virtual + len(factors))]
        virtual += len(factors)
        if not any(shards):
            text = str(size)  # a number may come as a symbol that equals it
            sizes.append(int(text) if text.isdecimal() else text)
            continue
        parts = [str(f) if s is None else s.counts[rank] for f, s in zip(factors, shards, strict=True)]
        numbers = [int(p) for p in parts if isinstance(p, int) or p.isdecimal()]
        symbols = [p for p in parts if isinstance(p, str) and not p.isdecimal()]
        number = math.prod(numbers)
        sizes.append("*".join([str(number), *symbols]) if symbols else number)
    return Local(tuple(sizes), value.dtype)


def describe(graph: fx.Graph, rank: int) -> None:
    """Set ``meta["local"]`` of every node: its local shape and dtype, or None where passes must not touch it."""
    for node in graph.nodes:
        if node.op == "output":
            node.meta["local"] = None
        elif node.target is operator.getitem and node.args[0].target is ops.enter:  # one of several that enter together
            node.meta["local"] = node.args[0].args[0][node.args[1]].meta["local"]
        elif node.meta.get("shaped", True):
            node.meta["local"] = _local_value(node, rank)
        else:
            node.meta["local"] = _broadcast_value(node)


def _broadcast_value(node: fx.Node) -> Local | None:
    """The local shape and dtype of a sum, product or negation, from its operands'; None if they do not tell."""
    operands = [n.meta["local"] for n in node.all_input_nodes]
    if op_name(node) not in ("aten.add", "aten.sub", "aten.mul", "aten.div", "aten.neg") or None in operands:
        return None
    rank = max(len(x.shape) for x in operands)
    sizes: list[Size] = []
    for column in zip(*((1,) * (rank - len(x.shape)) + x.shape for x in operands), strict=True):
        wide = {n for n in column if n != 1}
        if len(wide) > 1:
            return None
        sizes.append(wide.pop() if wide else 1)
    return Local(tuple(sizes), operands[0].dtype) if len({x.dtype for x in operands}) == 1 else None


def call(
    before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *,
    like: fx.Node, shape: Sequence[Size], dtype: torch.dtype | None = None, name: str | None = None,
) -> fx.Node:  # fmt: skip
    """Insert a call.

    Args:
        before: the node that the call is inserted before.
        target: the function that is called.
        args: the positional arguments.
        kwargs: the keyword arguments.
        like: the node that the call takes its module, source line, type and dtype from.
        shape: the result's local shape.
        dtype: the result's dtype, if it is not that of ``like``.
        name: the call's name.

    Returns:
        The new node.
    """
    with before.graph.inserting_before(before):
        node = before.graph.create_node("call_function", target, args, kwargs or {}, name or _name(target, like))
    node.meta = {k: like.meta[k] for k in ("module", "source", "grad", "type", "nn_module_stack") if k in like.meta}
    node.meta["local"] = Local(tuple(shape), dtype or local(like).dtype)
    return node


def _name(target: Callable[..., Any], like: fx.Node) -> str:
    """A call's name: its module's path and its function's name."""
    module = str(like.meta.get("module") or "").replace(".", "_")
    op = (str(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else target.__name__).split(".")[-1]
    return f"{module}_{op}" if module else op


def replace(node: fx.Node, new: fx.Node) -> None:
    """Replace a node by another one, and erase it."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def slice_arguments(node: fx.Node) -> tuple[fx.Node, int, Any, Any, Any]:
    """The value that an ``aten.slice`` reads, the dim from the left, start, stop and step."""
    args = [*node.args, *(None, 0, 0, sys.maxsize, 1)[len(node.args) :]]
    source, dim, start, stop, step = args
    assert isinstance(source, fx.Node)
    return source, int(dim) % len(local(source).shape), start or 0, stop, step


def remove_dead_code(graph: fx.Graph) -> int:
    """Dead-code elimination that keeps collectives; returns the number of removed nodes."""
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or n.target in COLLECTIVES)
    return before - len(graph.nodes)


_DENSE_OPS: dict[Any, Any] = {
    ops.column_parallel_linear: aten.linear.default,
    ops.row_parallel_linear: aten.linear.default,
    ops.column_parallel_matmul: aten.matmul.default,
    ops.row_parallel_matmul: aten.matmul.default,
    ops.column_parallel_addmm: aten.addmm.default,
    ops.column_parallel_baddbmm: aten.baddbmm.default,
    ops.head_parallel_attention: aten.scaled_dot_product_attention.default,
}


def call_dense_ops(graph: fx.Graph) -> None:
    """Call the dense op in place of each product of shards, whose name is for the reader of the rewritten graph."""
    for node in graph.nodes:
        node.target = _DENSE_OPS.get(node.target, node.target)
