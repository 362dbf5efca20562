"""functionalize: no node changes another's value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from passes.graphs import is_tensor, op_name
from passes.normalize.aliases import aliases, is_undeclared, sources

__all__ = ["functionalize"]

aten = torch.ops.aten


def _inverse(permutation: list[int]) -> list[int]:
    return sorted(range(len(permutation)), key=lambda i: permutation[i] % len(permutation))


_WRITES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "aten.slice": lambda base, new, *where: (aten.slice_scatter.default, base, new, *where),
    "aten.select": lambda base, new, *where: (aten.select_scatter.default, base, new, *where),
    "aten.unsqueeze": lambda _, new, dim: (aten.squeeze.dim, new, dim),
    "aten.transpose": lambda _, new, *dims: (aten.transpose.int, new, *dims),
    "aten.permute": lambda _, new, dims: (aten.permute.default, new, _inverse(dims)),
}
"""Per view op, the call that returns ``base`` with ``new`` in place of the elements that the view shows."""
_VIEWS = {*_WRITES, "aten.view", "aten.expand", "aten.squeeze", "aten.split", "aten.split_with_sizes", "aten.chunk",
          "aten.unbind", "aten.unflatten", "aten.t", "aten.alias", "aten.detach", "getitem"}  # fmt: skip
"""Ops whose result shares memory with their operand for any strides."""
_OVERLAPPING = {"aten.unfold", "aten.expand", "aten.expand_as", "aten.broadcast_to", "aten.as_strided"}
"""Views that may show one element more than once."""


def _out_of_place(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``."""
    name = str(target.overloadpacket).removeprefix("aten.")
    if not name.endswith("_") or name.startswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _promotes(functional: torch._ops.OpOverload, node: fx.Node) -> bool:
    """Whether the function's result has another dtype than the tensor that the in-place op mutates."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    return functional(*args, **kwargs).dtype != node.meta["val"].dtype


def _replace_in_place(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Replace an in-place op by a function, and rebuild the other values that it mutates; False if they are unknown.

    The op mutates a view of some base. A new base gets the function's result in the view's place, and each view
    of the base that is used afterwards is rebuilt from it. This is torch's own functionalization
    (https://dev-discuss.pytorch.org/t/965), but on a finished graph and without tracing again.
    """
    functional, mutated, graph = _out_of_place(node.target), node.args[0] if node.args else None, node.graph
    if torch.Tag.inplace_view in node.target.tags:  # changes the shape, not the elements
        return False
    if functional is None or not isinstance(mutated, fx.Node) or not is_tensor(mutated):
        return False

    def later(n: fx.Node) -> list[fx.Node]:
        return [u for u in n.users if order[u] > order[node]]

    views: list[fx.Node] = []  # from the base on
    base = mutated
    while op_name(base) in _WRITES:
        views.insert(0, base)
        base = base.args[0]
    seen = sorted((n for n in aliases(base) if n is not base and order[n] < order[node]), key=order.__getitem__)
    needed = {n for n in seen if later(n)} | {mutated}
    for n in reversed(seen):
        if n in needed:
            needed.update(n.all_input_nodes)
    stale = [n for n in seen if n in needed]
    origins = list(sources(base))
    inside = all(n.meta.get("no_grad") for n in origins)  # the base was computed without gradients too
    loses_gradients = node.meta.get("no_grad") and base.meta["val"].is_floating_point() and not inside
    others = {n for source in origins for n in aliases(source) if order[n] < order[node]} - {base, *seen}
    if (
        any(n.op != "call_function" or op_name(n) in _OVERLAPPING for n in origins)  # an input, a parameter
        or any(later(n) for n in others)
        or any(op_name(n) not in _VIEWS for n in stale)
        or loses_gradients
        or (op_name(node) != "aten.copy_" and _promotes(functional, node))
    ):
        return False

    def call(like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        result = graph.create_node("call_function", target, args, kwargs, name=target.overloadpacket.__name__)
        result.meta = {**node.meta, "val": like.meta["val"]}
        order[result] = order[node]
        return result

    with graph.inserting_before(node):
        new = call(mutated, functional, *node.args, **node.kwargs)
        for view in reversed(views):
            target, *args = _WRITES[op_name(view)](view.args[0], new, *view.args[1:])
            new = call(view.args[0], target, *args, **view.kwargs)
        rebuilt = {base: new}
        for n in stale:
            rebuilt[n] = call(n, n.target, *fx.map_arg(n.args, lambda a: rebuilt.get(a, a)), **n.kwargs)
    for old, replacement in rebuilt.items():
        for user in later(old):
            user.replace_input_with(old, replacement)
    node.replace_all_uses_with(rebuilt[mutated])
    graph.erase_node(node)
    return True


def functionalize(graph: fx.Graph) -> list[fx.Node]:
    """Turn in-place ops into functions.

    Args:
        graph: a captured graph without regions, changed in place.

    Returns:
        The nodes that still mutate an argument; none if the graph is now functional. The other values that see such a
        mutation depend on strides or lie outside of the graph (``meta["roots"]`` has the inputs and weights that may
        be mutated), or gradients or values may miss the mutation (``meta["unrecorded"]``).
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    remaining = []
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        if op_name(node) == "aten.detach_":
            node.target = aten.detach.default
        elif not _replace_in_place(node, order):
            remaining.append(node)
            mutated = node.args[0]
            node.meta["roots"] = [n for n in sources(mutated) if n.op != "call_function"] if is_tensor(mutated) else []
            if is_tensor(mutated):  # torch's own functionalization would lose the region's end, and undeclared views
                views = {n for source in sources(mutated) for n in aliases(source)}
                stopped = node.meta.get("no_grad") and mutated.meta["val"].is_floating_point()
                node.meta["unrecorded"] = bool(stopped) or any(is_undeclared(n) for n in views)
    return remaining
