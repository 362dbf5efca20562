"""What a rank's graph knows of its values: their local shapes and dtypes; and how a pass puts in nodes.

A lowered graph is one rank's, so every split size is a number. Sizes that differ from call to call are texts, which
are equal where the sizes are.
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
    "cut",
    "describe",
    "is_tensor",
    "local",
    "numel",
    "plain",
    "remove_dead_code",
    "replace",
]

Size = int | str

aten = torch.ops.aten


@dataclass(frozen=True)
class Local:
    """A value on this rank.

    Attributes:
        shape: its sizes; a text for one that differs from call to call.
        dtype: its dtype.
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype


def local(node: Any) -> Local:
    """A tensor node's value on this rank."""
    found: Local = node.meta["local"]
    return found


def is_tensor(node: Any) -> bool:
    """Whether an argument is a node that stands for a tensor."""
    return isinstance(node, fx.Node) and node.meta.get("local") is not None


def numel(shape: Sequence[Size]) -> int | None:
    """The number of elements, where it is the same in every call."""
    return math.prod(n for n in shape if isinstance(n, int)) if all(isinstance(n, int) for n in shape) else None


def _of(node: fx.Node, rank: int) -> Local | None:
    value, layout = node.meta.get("global"), node.meta.get("layout")
    if not isinstance(value, torch.Tensor) or node.meta.get("state") == "size":
        return None
    sizes: list[Size] = []
    held, virtual = layout.dims if layout is not None else {}, 0
    axes = node.meta.get("axes") or [()] * value.dim()
    for size, factors in zip(value.shape, axes, strict=True):
        shards = [held.get(v) for v in range(virtual, virtual + len(factors))]
        virtual += len(factors)
        if not any(shards):
            text = str(size)  # a number may come as a symbol that was found to be one
            sizes.append(int(text) if text.isdecimal() else text)
            continue
        parts = [str(f) if s is None else s.counts[rank] for f, s in zip(factors, shards, strict=True)]
        numbers = [int(p) for p in parts if isinstance(p, int) or p.isdecimal()]
        rest = [p for p in parts if isinstance(p, str) and not p.isdecimal()]
        number = math.prod(numbers)
        sizes.append("*".join([str(number), *rest]) if rest else number)
    return Local(tuple(sizes), value.dtype)


def describe(graph: fx.Graph, rank: int) -> None:
    """Note every value's local shape and dtype; None where a pass is not to touch it."""
    for node in graph.nodes:
        if node.op == "output":
            node.meta["local"] = None
        elif node.target is operator.getitem and node.args[0].target is ops.enter:  # of several that enter together
            node.meta["local"] = node.args[0].args[0][node.args[1]].meta["local"]
        elif node.meta.get("shaped", True):
            node.meta["local"] = _of(node, rank)
        else:
            node.meta["local"] = _broadcast(node)


def _broadcast(node: fx.Node) -> Local | None:
    """The value of a sum, product or negation, from its operands'."""
    given = [n.meta["local"] for n in node.all_input_nodes]
    if op_name(node) not in ("aten.add", "aten.sub", "aten.mul", "aten.div", "aten.neg") or None in given:
        return None
    rank = max(len(g.shape) for g in given)
    sizes: list[Size] = []
    for column in zip(*((1,) * (rank - len(g.shape)) + g.shape for g in given), strict=True):
        wide = {n for n in column if n != 1}
        if len(wide) > 1:
            return None
        sizes.append(wide.pop() if wide else 1)
    return Local(tuple(sizes), given[0].dtype) if len({g.dtype for g in given}) == 1 else None


def call(
    before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *,
    like: fx.Node, shape: Sequence[Size], dtype: torch.dtype | None = None, name: str | None = None,
) -> fx.Node:  # fmt: skip
    """Put in a call that takes its place in the text, and its dtype, from another node.

    Args:
        before: the node that it comes before.
        target: what it calls.
        args: on these.
        kwargs: and these.
        like: the node whose module, source line, type and dtype it has.
        shape: its result's local shape.
        dtype: its result's dtype, if it is another.
        name: its name.
    """
    with before.graph.inserting_before(before):
        node = before.graph.create_node("call_function", target, args, kwargs or {}, name or _name(target, like))
    node.meta = {k: like.meta[k] for k in ("module", "source", "grad", "type", "nn_module_stack") if k in like.meta}
    node.meta["local"] = Local(tuple(shape), dtype or local(like).dtype)
    return node


def _name(target: Callable[..., Any], like: fx.Node) -> str:
    module = str(like.meta.get("module") or "").replace(".", "_")
    op = (str(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else target.__name__).split(".")[-1]
    return f"{module}_{op}" if module else op


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let one node stand for another, which goes."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def cut(node: fx.Node) -> tuple[fx.Node, int, Any, Any, Any]:
    """What an ``aten.slice`` cuts: the value, the dim from the left, start, stop and step."""
    given = [*node.args, *(None, 0, 0, sys.maxsize, 1)[len(node.args) :]]
    source, dim, start, stop, step = given
    assert isinstance(source, fx.Node)
    return source, int(dim) % len(local(source).shape), start or 0, stop, step


def remove_dead_code(graph: fx.Graph) -> int:
    """Take out what nothing reads, but nothing by which ranks meet; how many nodes went."""
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or n.target in COLLECTIVES)
    return before - len(graph.nodes)


_PLAIN: dict[Any, Any] = {
    ops.column_parallel_linear: aten.linear.default,
    ops.row_parallel_linear: aten.linear.default,
    ops.column_parallel_matmul: aten.matmul.default,
    ops.row_parallel_matmul: aten.matmul.default,
    ops.column_parallel_addmm: aten.addmm.default,
    ops.column_parallel_baddbmm: aten.baddbmm.default,
    ops.head_parallel_attention: aten.scaled_dot_product_attention.default,
}


def plain(graph: fx.Graph) -> None:
    """Call the products of shards what they compute; their names are for the reader of the rewritten graph."""
    for node in graph.nodes:
        node.target = _PLAIN.get(node.target, node.target)
