"""functionalize: no node changes another's value, and no region hides nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import fx

from passes.graphs import is_tensor, op_name

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
_UNDECLARED = {"aten.einsum", "aten.meshgrid", "aten.unsafe_chunk", "aten.unsafe_split", "aten.unsafe_split_with_sizes",
               "aten.broadcast_tensors", "aten.cartesian_prod", "aten.tensordot"}  # fmt: skip
_DROPS = {"aten.dropout", "aten.alpha_dropout", "aten.feature_dropout", "aten.feature_alpha_dropout"}
_UNDECLARED |= _DROPS
"""What may share memory though its schema does not say so."""
_OVERLAPPING = {"aten.unfold", "aten.expand", "aten.expand_as", "aten.broadcast_to", "aten.as_strided"}
"""Views that may show one element more than once."""
_ITSELF = {"aten.to", "aten.dropout", "aten.real", "aten.resolve_conj", "aten.resolve_neg", "aten.atleast_1d",
           "aten.atleast_2d", "aten.atleast_3d"}  # fmt: skip
"""What may return its argument itself, which torch.export takes for a new tensor."""


def _may_alias(node: fx.Node) -> bool:
    """Whether a node's value may share memory with another's: by its op's schema, or as a part of one that does."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.target is operator.getitem:
        return _may_alias(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returned = [r.alias_info for r in node.target._schema.returns]
    return op_name(node) in _UNDECLARED or any(a is not None and not a.is_write for a in returned)


def _itself(node: fx.Node) -> fx.Node:
    """The argument that an op returned as it was: of a cast to its own type, of dropout that drops nothing."""
    while op_name(node) in _ITSELF and is_tensor(node) and is_tensor(node.args[0]):
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
        was, value = node.args[0].meta["val"], node.meta["val"]
        if given.get("copy") or given.get("memory_format") is not None or given.get("train"):
            break
        if (was.dtype, was.device, was.dim()) != (value.dtype, value.device, value.dim()):
            break
        node = node.args[0]
    return node


def _stopped(graph: fx.Graph, node: fx.Node, inputs: Collection[fx.Node]) -> fx.Node:
    """A result of a region without gradients; one that is an input as it was keeps its own."""
    if node in inputs:
        return node
    stopped = graph.call_function(aten.detach.default, (node,))
    stopped.meta = dict(node.meta)
    return stopped


def _inline_no_grad(graph: fx.Graph, node: fx.Node) -> None:
    """Put the nodes of a ``wrap_with_set_grad_enabled`` region in place of the call.

    Where the region switched gradients off, its results are detached, which stops them all the same.
    """
    enabled, region_ref, *inputs = node.args
    region = getattr(graph.owning_module, region_ref.target)
    with graph.inserting_before(node):
        copies = dict(zip([n for n in region.graph.nodes if n.op == "placeholder"], inputs, strict=True))
        for inner in region.graph.nodes:
            if inner.op == "output":
                results = fx.map_arg(inner.args[0], lambda n: copies[n])
            elif inner.op != "placeholder":
                copies[inner] = graph.node_copy(inner, lambda n: copies[n])
                copies[inner].meta["no_grad"] = not enabled
                if inner.op == "get_attr":  # a region within: regions name theirs alike, so under a name of its own
                    name = f"{region_ref.target}_{inner.target}"
                    setattr(graph.owning_module, name, getattr(region, inner.target))
                    copies[inner].target = name
        if not enabled:
            results = [_stopped(graph, _itself(r), inputs) if is_tensor(r) else r for r in results]
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not region_ref.users:
        graph.erase_node(region_ref)


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


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """A node and those that its value may share memory with because it is made of them."""
    yield node
    if node.op == "call_function" and _may_alias(node):
        for source in node.all_input_nodes:
            yield from _sources(source)


def _aliases(node: fx.Node) -> dict[fx.Node, None]:
    """A node and those whose values may share memory with its own because they are made of it, in order."""
    found, pending = {node: None}, [node]
    while pending:
        made = [u for u in pending.pop().users if u.op == "call_function" and u not in found and _may_alias(u)]
        found.update(dict.fromkeys(made))
        pending += made
    return found


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
    seen = sorted((n for n in _aliases(base) if n is not base and order[n] < order[node]), key=order.__getitem__)
    needed = {n for n in seen if later(n)} | {changed}
    for n in reversed(seen):
        if n in needed:
            needed.update(n.all_input_nodes)
    again = [n for n in seen if n in needed]
    sources = list(_sources(base))
    inside = all(n.meta.get("no_grad") for n in sources)  # made where gradients are not followed either
    node.meta["unrecorded"] = bool(node.meta.get("no_grad")) and base.meta["val"].is_floating_point() and not inside
    around = {n for source in sources for n in _aliases(source) if order[n] < order[node]} - {base, *seen}
    if (
        any(n.op != "call_function" or op_name(n) in _OVERLAPPING for n in sources)  # an input, a parameter
        or any(later(n) for n in around)
        or any(op_name(n) not in _VIEWS for n in again)
        or node.meta["unrecorded"]
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
    """Inline no-grad regions and turn in-place ops into functions.

    Args:
        graph: a captured graph, changed in place.

    Returns:
        The nodes that still change an argument, because what else sees the change depends on strides, or is
        outside the graph, or because gradients or values may pass it by unseen (``unrecorded`` in its meta):
        none in a graph that is now functional.
    """
    while regions := [n for n in graph.nodes if op_name(n) == "wrap_with_set_grad_enabled"]:
        for node in regions:
            _inline_no_grad(graph, node)
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
            if is_tensor(changed):  # torch's own functionalization would lose where the region ends, and these views
                around = {n for source in _sources(changed) for n in _aliases(source)}
                stopped = node.meta.get("no_grad") and changed.meta["val"].is_floating_point()
                node.meta["unrecorded"] = bool(stopped) or any(op_name(n) in _UNDECLARED - _DROPS for n in around)
    return left
