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


_WRITTEN: dict[str, Callable[..., tuple[Any, ...]]] = {
    "aten.slice": lambda base, new, *where: (aten.slice_scatter.default, base, new, *where),
    "aten.select": lambda base, new, *where: (aten.select_scatter.default, base, new, *where),
    "aten.unsqueeze": lambda _, new, dim: (aten.squeeze.dim, new, dim),
    "aten.transpose": lambda _, new, *dims: (aten.transpose.int, new, *dims),
    "aten.permute": lambda _, new, dims: (aten.permute.default, new, _inverse(dims)),
}
"""By view: the call that gives ``base`` with ``new`` in place of what the view shows of it."""
_VIEWS = {*_WRITTEN, "aten.view", "aten.expand", "aten.squeeze", "aten.split", "aten.split_with_sizes", "aten.chunk",
          "aten.unbind", "aten.unflatten", "aten.t", "aten.alias", "aten.detach", "getitem"}  # fmt: skip
"""What shares memory with what it is made of whatever the strides are."""
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
    """Whether the function's result is of another dtype than the tensor that the in-place op changes."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    return functional(*args, **kwargs).dtype != node.meta["val"].dtype


def _made_anew(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Replace an in-place op by a function, and make anew what else sees the change; False if that is not known.

    What the op changes is a view of some base: the base is made anew with the result in that place, and its
    views that are used afterwards are made anew of it, as torch's own functionalization does
    (https://dev-discuss.pytorch.org/t/965), but on a finished graph and without tracing again.
    """
    functional, changed, graph = _out_of_place(node.target), node.args[0] if node.args else None, node.graph
    if torch.Tag.inplace_view in node.target.tags:  # changes the shape, not the elements
        return False
    if functional is None or not isinstance(changed, fx.Node) or not is_tensor(changed):
        return False

    def later(n: fx.Node) -> list[fx.Node]:
        return [u for u in n.users if order[u] > order[node]]

    views: list[fx.Node] = []  # from the base on
    base = changed
    while op_name(base) in _WRITTEN:
        views.insert(0, base)
        base = base.args[0]
    seen = sorted((n for n in aliases(base) if n is not base and order[n] < order[node]), key=order.__getitem__)
    needed = {n for n in seen if later(n)} | {changed}
    for n in reversed(seen):
        if n in needed:
            needed.update(n.all_input_nodes)
    again = [n for n in seen if n in needed]
    made_of = list(sources(base))
    inside = all(n.meta.get("no_grad") for n in made_of)  # made where gradients are not followed either
    passed_by = node.meta.get("no_grad") and base.meta["val"].is_floating_point() and not inside
    around = {n for source in made_of for n in aliases(source) if order[n] < order[node]} - {base, *seen}
    if (
        any(n.op != "call_function" or op_name(n) in _OVERLAPPING for n in made_of)  # an input, a parameter
        or any(later(n) for n in around)
        or any(op_name(n) not in _VIEWS for n in again)
        or passed_by
        or (op_name(node) != "aten.copy_" and _promotes(functional, node))
    ):
        return False

    def call(like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.create_node("call_function", target, args, kwargs, name=target.overloadpacket.__name__)
        made.meta = {**node.meta, "val": like.meta["val"]}
        order[made] = order[node]
        return made

    with graph.inserting_before(node):
        new = call(changed, functional, *node.args, **node.kwargs)
        for view in reversed(views):
            target, *args = _WRITTEN[op_name(view)](view.args[0], new, *view.args[1:])
            new = call(view.args[0], target, *args, **view.kwargs)
        anew = {base: new}
        for n in again:
            anew[n] = call(n, n.target, *fx.map_arg(n.args, lambda a: anew.get(a, a)), **n.kwargs)
    for old, its in anew.items():
        for user in later(old):
            user.replace_input_with(old, its)
    node.replace_all_uses_with(anew[changed])
    graph.erase_node(node)
    return True


def functionalize(graph: fx.Graph) -> list[fx.Node]:
    """Turn in-place ops into functions.

    Args:
        graph: a captured graph without regions, changed in place.

    Returns:
        The nodes that still change an argument, because what else sees the change depends on strides, or is
        outside the graph (the inputs and weights that it may be are ``roots`` in its meta), or because gradients or
        values may pass it by unseen (``unrecorded`` there): none in a graph that is now functional.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    left = []
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        if op_name(node) == "aten.detach_":
            node.target = aten.detach.default
        elif not _made_anew(node, order):
            left.append(node)
            changed = node.args[0]
            node.meta["roots"] = [n for n in sources(changed) if n.op != "call_function"] if is_tensor(changed) else []
            if is_tensor(changed):  # torch's own functionalization would lose where the region ends, and these views
                around = {n for source in sources(changed) for n in aliases(source)}
                stopped = node.meta.get("no_grad") and changed.meta["val"].is_floating_point()
                node.meta["unrecorded"] = bool(stopped) or any(is_undeclared(n) for n in around)
    return left
