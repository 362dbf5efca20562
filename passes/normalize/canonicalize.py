"""canonicalize: one spelling for each way to slice, join, repeat and fill tensors."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from passes.graphs import is_tensor, op_name
from passes.ops.single_results import OUTPUTS

__all__ = ["canonicalize"]

_SPLITS = {"aten.chunk", "aten.split", "aten.split_with_sizes", "aten.unbind", "aten.unsafe_chunk", "aten.unsafe_split",
           "aten.tensor_split"}  # fmt: skip
aten = torch.ops.aten
_FILLS = {"aten.empty": aten.zeros.default, "aten.new_empty": aten.zeros.default, "aten.new_zeros": aten.zeros.default,
          "aten.new_ones": aten.ones.default, "aten.new_full": aten.full.default}  # fmt: skip
"""Ops that make a tensor by its sizes; uninitialized memory becomes zeros, because it differs between ranks."""


def _call(origin: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Insert a node that does part of what ``origin`` did."""
    new = origin.graph.call_function(target, args)
    new.meta = {**origin.meta, "val": target(*fx.map_arg(args, lambda n: n.meta["val"]))}
    return new


def _dim_of(node: fx.Node) -> int:
    position = 1 if op_name(node) == "aten.unbind" else 2
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return dim % node.args[0].meta["val"].dim()


_ALIASES = {"aten.multiply": aten.mul, "aten.divide": aten.div, "aten.true_divide": aten.div, "aten.subtract": aten.sub,
            "aten.negative": aten.neg, "aten.absolute": aten.abs, "aten.concat": aten.cat, "aten.concatenate": aten.cat,
            "aten.clip": aten.clamp}  # fmt: skip


def _rename(node: fx.Node) -> bool:
    """Replace an op that is an alias by the op itself."""
    node.target = getattr(_ALIASES[op_name(node)], node.target._overloadname)
    return True


def _slice(origin: fx.Node, source: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
    """A slice of ``source``; of a ``cat``, a slice of the one operand that contains it, or that operand."""
    while (operand := _operand_of_cat(source, dim, start, stop)) is not None:
        source, first = operand
        start, stop = start - first, stop - first
        if (start, stop) == (0, source.meta["val"].shape[dim]):
            return source
    return _call(origin, aten.slice.Tensor, source, dim, start, stop)


def _operand_of_cat(cat: fx.Node, dim: int, start: int, stop: int) -> tuple[fx.Node, int] | None:
    """The one operand of a ``cat`` along ``dim`` that contains a range, and its first index."""
    if op_name(cat) != "aten.cat":
        return None
    cat_dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    sizes = [p.meta["val"].shape[dim] for p in cat.args[0]]
    if cat_dim % cat.meta["val"].dim() != dim or not all(isinstance(n, int) for n in sizes):
        return None
    for operand, size, last in zip(cat.args[0], sizes, itertools.accumulate(sizes), strict=True):
        if last - size <= start < stop <= last:
            return operand, last - size
    return None


def _split_as_slices(node: fx.Node) -> bool:
    """Replace the results of a split by slices (of ``unbind``, by selects) of its input."""
    source, parts = node.args[0], node.meta["val"]
    dim = _dim_of(node)
    if not all(isinstance(p.shape[dim] if op_name(node) != "aten.unbind" else 0, int) for p in parts):
        return False
    if any(u.target is not operator.getitem for u in node.users):
        return False
    starts = [0]
    if op_name(node) != "aten.unbind":
        for part in parts:
            starts.append(starts[-1] + part.shape[dim])
    for user in list(node.users):
        index = user.args[1] % len(parts)
        with node.graph.inserting_before(user):
            if op_name(node) == "aten.unbind":
                new = _call(node, aten.select.int, source, dim, index)
            else:
                new = _slice(node, source, dim, starts[index], starts[index + 1])
        user.replace_all_uses_with(new)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def _as_single_results(node: fx.Node) -> bool:
    """Replace an op with several results by one node per used result."""
    if any(u.target is not operator.getitem for u in node.users):
        return False
    for user in list(node.users):
        with node.graph.inserting_before(user):
            new = node.graph.call_function(OUTPUTS[node.target][user.args[1]], node.args, dict(node.kwargs))
        new.meta = {**node.meta, **{k: user.meta[k] for k in ("val", "grad") if k in user.meta}}
        user.replace_all_uses_with(new)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def _stack_as_cat(node: fx.Node) -> bool:
    """Replace ``stack`` by ``cat`` of its inputs, each unsqueezed."""
    value = node.meta["val"]
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % value.dim()
    with node.graph.inserting_before(node):
        parts = [_call(node, aten.unsqueeze.default, part, dim) for part in node.args[0]]
    node.target, node.args, node.kwargs = aten.cat.default, (parts, dim), {}
    return True


def _repeat_as_expand(node: fx.Node) -> bool:
    """Replace ``repeat`` and ``repeat_interleave`` by an expanded new dim, flattened with its neighbour.

    ``repeat`` by ``r`` along a dim is ``(r n)``, ``repeat_interleave`` is ``(n r)``.
    """
    source = new = node.args[0]
    if op_name(node) == "aten.repeat":
        counts, inner = list(node.args[1]), False
    else:
        if node.target is not aten.repeat_interleave.self_int or len(node.args) < 3 or node.args[2] is None:
            return False
        rank = node.meta["val"].dim()
        counts, inner = [node.args[1] if d == node.args[2] % rank else 1 for d in range(rank)], True
    with node.graph.inserting_before(node):
        for _ in range(len(counts) - source.meta["val"].dim()):
            new = _call(node, aten.unsqueeze.default, new, 0)
        for d, count in enumerate(counts):
            if isinstance(count, int) and count == 1:
                continue
            alone = new.meta["val"].shape[d] == 1
            if not alone:
                new = _call(node, aten.unsqueeze.default, new, d + inner)
            at = d + inner if not alone else d
            sizes = [count if e == at else -1 for e in range(new.meta["val"].dim())]
            new = _call(node, aten.expand.default, new, sizes)
            if not alone:
                new = _call(node, aten.flatten.using_ints, new, d, d + 1)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return True


def _as_fill(node: fx.Node) -> bool:
    """Replace ``x.new_zeros(sizes)`` and the like by ``zeros(sizes)``, which does not read ``x``."""
    value, args = node.meta["val"], node.args[op_name(node) != "aten.empty" :]
    node.target, node.args = _FILLS[op_name(node)], args
    node.kwargs = {"dtype": value.dtype, "device": value.device}
    return True


def _is_all(bounds: Sequence[Any]) -> bool:
    """Whether a slice's bounds span a dim of any size."""
    default: list[Any] = [None, None, 1]
    start, stop, step = [*bounds, *default[len(bounds) :]]
    return start in (0, None) and (stop is None or (isinstance(stop, int) and stop >= sys.maxsize)) and step == 1


def _scatter_as_cat(node: fx.Node) -> bool:
    """Replace ``slice_scatter`` and ``select_scatter`` by ``cat`` of the new slice and the rest of the base."""
    base: fx.Node = node.args[0]
    new: fx.Node = node.args[1]
    value, graph = node.meta["val"], node.graph
    dim = (node.args[2] if len(node.args) > 2 else 0) % value.dim()
    size, bounds = value.shape[dim], node.args[3:]
    if new.meta["val"].dtype != value.dtype:  # the scatter casts
        return False
    if op_name(node) == "aten.slice_scatter" and _is_all(bounds):
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
        return True
    if not isinstance(size, int) or node.kwargs or any(isinstance(b, fx.Node) for b in bounds):
        return False
    selected = op_name(node) == "aten.select_scatter"
    if selected:
        start, stop, step = bounds[0] % size, bounds[0] % size + 1, 1
    else:
        start, stop, step = slice(*bounds).indices(size) if bounds else (0, size, 1)
    if step != 1 or stop <= start:
        return False
    with graph.inserting_before(node):
        if selected:
            new = _call(node, aten.unsqueeze.default, new, dim)
        before = [_slice(node, base, dim, 0, start)] if start else []
        after = [_slice(node, base, dim, stop, size)] if stop < size else []
        parts = [*before, new, *after]
    if parts == [new]:
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return True
    node.target, node.args = aten.cat.default, (parts, dim)
    return True


def _slice_of_cat(node: fx.Node) -> bool:
    """Replace a slice of a ``cat`` by a slice of the one operand that contains it, or by that operand."""
    source, value = node.args[0], node.meta["val"]
    dim, *bounds = node.args[1:] or (0,)
    size = source.meta["val"].shape[dim]
    if any(isinstance(a, fx.Node) for a in node.args[1:]) or not isinstance(size, int):
        return False
    start, stop, step = slice(*bounds).indices(size) if bounds else (0, size, 1)
    if step != 1 or _operand_of_cat(source, dim % value.dim(), start, stop) is None:
        return False
    with node.graph.inserting_before(node):
        node.replace_all_uses_with(_slice(node, source, dim % value.dim(), start, stop))
    node.graph.erase_node(node)
    return True


def _index_as_slices(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> bool:
    """Replace indexing of one dim by a constant vector (``x[:, [0, 2]]``) by ``cat`` of slices."""
    source, indices = node.args
    used = [(dim, n) for dim, n in enumerate(indices) if n is not None]
    if len(used) != 1 or str(used[0][1].target) not in constants:
        return False
    dim, picked = used[0][0], constants[str(used[0][1].target)]
    if picked.dim() != 1 or picked.is_floating_point() or picked.dtype is torch.bool or not 0 < len(picked) <= 64:
        return False
    size = source.meta["val"].shape[dim]
    if not isinstance(size, int):
        return False
    parts = []
    with node.graph.inserting_before(node):
        for i in picked.tolist():
            parts.append(_slice(node, source, dim, i % size, i % size + 1))
    if len(parts) == 1:
        node.replace_all_uses_with(parts[0])
        node.graph.erase_node(node)
    else:
        node.target, node.args = aten.cat.default, (parts, dim)
    return True


def _sizes_of(node: fx.Node) -> list[Any]:
    """The sizes of a value; symbolic ones are nodes that are inserted after it."""
    sizes, graph = list(node.meta["val"].shape), node.graph
    with graph.inserting_after(node):
        for dim, size in enumerate(sizes):
            if not isinstance(size, int):
                sizes[dim] = graph.call_function(aten.sym_size.int, (node, dim))
                sizes[dim].meta = {**node.meta, "val": size}
    return sizes


def _copy_as_source(node: fx.Node) -> bool:
    """Replace ``copy`` (which functionalization makes of ``copy_``) by its source, in its own shape and dtype."""
    destination, source, graph = node.args[0], node.args[1], node.graph
    value, new = node.meta["val"], source
    with graph.inserting_before(node):
        if source.meta["val"].dtype != value.dtype:
            new = _call(node, aten.to.dtype, source, value.dtype)
        if source.meta["val"].shape != value.shape:
            new = graph.call_function(aten.expand.default, (new, _sizes_of(destination)))
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def _reshape_to_sizes(node: fx.Node) -> bool:
    """Replace ``view_as`` and ``expand_as`` by ``reshape`` and ``expand`` to the other's sizes."""
    source, other = node.args
    node.target = aten.expand.default if op_name(node) == "aten.expand_as" else aten.reshape.default
    node.args = (source, _sizes_of(other))
    return True


def _as_cross_entropy(node: fx.Node) -> bool:
    """Replace ``nll_loss`` of ``log_softmax`` by the cross entropy of the logits."""
    source, *rest = node.args
    softmax, reshaped = source, None
    if op_name(source) in ("aten.view", "aten.reshape", "aten.flatten") and source.meta["val"].dim() == 2:
        softmax, reshaped = source.args[0], source
    if op_name(softmax) != "aten.log_softmax":
        return False
    logits, dim, *_ = softmax.args
    value = softmax.meta["val"]
    last, classes = value.dim() - 1, source.meta["val"].shape[-1]
    if dim % value.dim() != (min(1, last) if reshaped is None else last) or value.shape[-1] != classes:
        return False
    if reshaped is not None and not isinstance(classes, int):
        return False
    with node.graph.inserting_before(node):
        if logits.meta["val"].dtype != value.dtype:
            logits = _call(node, aten.to.dtype, logits, value.dtype)
        if reshaped is not None:
            logits = _call(node, reshaped.target, logits, *reshaped.args[1:])
    node.target, node.args = aten.cross_entropy_loss.default, (logits, *rest)
    return True


def _as_rows(node: fx.Node) -> bool:
    """Reshape the logits of a cross entropy from ``(batch, classes, ...)`` to ``(batch * ..., classes)``."""
    logits, target, *rest = node.args
    rank = logits.meta["val"].dim()
    if rank < 3 or target.meta["val"].is_floating_point():
        return False
    unreduced = len(rest) > 1 and rest[1] == 0
    sizes = _sizes_of(target) if unreduced else []
    with node.graph.inserting_before(node):
        logits = _call(node, aten.permute.default, logits, [0, *range(2, rank), 1])
        rows = _call(node, aten.flatten.using_ints, logits, 0, rank - 2)
        target = _call(node, aten.flatten.using_ints, target, 0, -1)
        loss = _call(node, node.target, rows, target, *rest)
        if unreduced:
            loss = _call(node, aten.reshape.default, loss, sizes)
    node.replace_all_uses_with(loss)
    node.graph.erase_node(node)
    return True


def _is_only_a_base(node: fx.Node) -> bool:
    """Whether a value is only the base of ``index_copy`` and ``index_put``."""
    writes = ("aten.index_copy", "aten.index_put")
    return bool(node.users) and all(op_name(u) in writes and u.args.index(node) == 0 for u in node.users)


def _as_expanded_number(node: fx.Node) -> bool:
    """Replace a constant tensor by one number, expanded: it takes no memory, and any shard of it is expanded too."""
    sizes, *rest = node.args
    if not sizes:
        return False
    with node.graph.inserting_before(node):
        one = node.graph.call_function(node.target, ([], *rest), dict(node.kwargs))
    one.meta = {**node.meta, "val": node.meta["val"].new_empty(())}
    node.target, node.args, node.kwargs = aten.expand.default, (one, list(sizes)), {}
    return True


def canonicalize(graph: fx.Graph, constants: Mapping[str, torch.Tensor] | None = None) -> int:
    """Respell ops: ``chunk``, ``split``, ``tensor_split``, ``unbind`` and indexing by a constant vector as slices
    and selects, ``stack`` and writing to a slice as ``cat``, ``repeat`` and ``repeat_interleave`` as ``expand``,
    ``copy`` as its source, ``view_as`` and ``expand_as`` by sizes, ``new_zeros`` as ``zeros``, a constant that is
    only written into as one number expanded, empty memory as zeros, each result of ``max`` along a dim by itself,
    ``type_as`` as a cast, ``multiply`` and the like as ``mul``, ``nll_loss`` of ``log_softmax`` as cross entropy,
    cross entropy over rows of classes, and ``view`` as ``reshape`` (a shard need not be contiguous where the global
    value is).

    Args:
        graph: a functional captured graph; changed in place.
        constants: the graph's constant tensors, by ``get_attr`` target.

    Returns:
        The number of respelled nodes.
    """
    count = 0
    for node in list(graph.nodes):
        if op_name(node) in _ALIASES:
            count += _rename(node)
        if op_name(node) in _SPLITS and is_tensor(node.args[0]):
            count += _split_as_slices(node)
        elif node.target in OUTPUTS:
            count += _as_single_results(node)
        elif op_name(node) in ("aten.repeat", "aten.repeat_interleave") and is_tensor(node.args[0]):
            count += _repeat_as_expand(node)
        elif node.target is aten.index.Tensor and constants:
            count += _index_as_slices(node, constants)
        elif op_name(node) == "aten.stack":
            count += _stack_as_cat(node)
        elif op_name(node) in _FILLS and (node.target is aten.empty.memory_format or op_name(node) != "aten.empty"):
            count += _as_fill(node)
        elif op_name(node) == "aten.empty_like":
            node.target = aten.zeros_like.default
            count += 1
        elif node.target is aten.slice.Tensor:
            count += _slice_of_cat(node)
        elif op_name(node) in ("aten.slice_scatter", "aten.select_scatter"):
            count += _scatter_as_cat(node)
        elif op_name(node) == "aten.copy":
            count += _copy_as_source(node)
        elif op_name(node) in ("aten.nll_loss_nd", "aten.nll_loss") and is_tensor(node.args[0]):
            count += _as_cross_entropy(node)
        elif op_name(node) == "aten.type_as" or node.target is aten.to.other:
            node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.meta["val"].dtype), {}
            count += 1
        elif op_name(node) in ("aten.view_as", "aten.reshape_as", "aten.expand_as"):
            count += _reshape_to_sizes(node)
        elif op_name(node) in ("aten.view", "aten._unsafe_view") and node.target is not aten.view.dtype:
            node.target = aten.reshape.default
            count += 1
        if op_name(node) == "aten.cross_entropy_loss":
            count += _as_rows(node)
        elif op_name(node) in ("aten.zeros", "aten.ones", "aten.full") and _is_only_a_base(node):
            count += _as_expanded_number(node)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return count
