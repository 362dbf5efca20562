"""cache_in_place: write new tokens into caches of keys and values, without a copy of the cache.

A cache that grows gets them in memory that has room behind it, and a cache of fixed size at their positions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import is_tensor, local, remove_dead_code

__all__ = ["cache_in_place", "cat_in_place", "write_slice"]

aten = torch.ops.aten

_MIN_ROOM = 32
_ROOM_DIVISOR = 8
"""Room is left for ``_MIN_ROOM`` more indices of the dim, or for its length over ``_ROOM_DIVISOR`` if that is more."""


_ROOM = "_autotp_room"
"""The attribute of a tensor that has room behind it: the memory, and the length in use along the dim that grows.

Several tensors that begin alike may use one memory. The attribute is a list, which they share and which files can hold.
"""


def cat_in_place(old: torch.Tensor, new: torch.Tensor, dim: int) -> torch.Tensor:
    """``torch.cat((old, new), dim)``, without a gradient, and without a copy of ``old`` if there is room behind it.

    The result has room behind it, which is written to once: a second value that is appended to the same ``old`` goes,
    with a copy of ``old``, into memory of its own. So ``old`` keeps its values. But ``old`` and the result share
    memory: a later write into one of them changes the other, too.

    Args:
        old: ``(..., n, ...)``.
        new: ``(..., m, ...)``, of the same dtype.
        dim: the dim that grows.

    Returns:
        ``(..., n + m, ...)``, whose strides leave room in that dim.
    """
    begin, end = old.shape[dim], old.shape[dim] + new.shape[dim]
    room = getattr(old, _ROOM, None)
    if room is None or room[1] != begin or end > room[0].shape[dim] or not _is_prefix(old, room[0], dim):
        shape = list(old.shape)
        shape[dim] = end + max(_MIN_ROOM, end // _ROOM_DIVISOR)
        room = [old.new_empty(shape), begin]
        room[0].narrow(dim, 0, begin).copy_(old)
    memory: torch.Tensor = room[0]
    memory.narrow(dim, begin, end - begin).copy_(new)
    room[1] = end
    result = memory.narrow(dim, 0, end)
    setattr(result, _ROOM, room)  # stays with the tensor, in deep copies of it, too
    return result


def _is_prefix(old: torch.Tensor, memory: torch.Tensor, dim: int) -> bool:
    """Whether a tensor still is the beginning of a memory, which may be written to in the present mode."""
    if memory.is_inference() and not torch.is_inference_mode_enabled():
        return False
    same = old.data_ptr() == memory.data_ptr() and old.stride() == memory.stride() and old.dtype == memory.dtype
    return same and all(a == b for d, (a, b) in enumerate(zip(old.shape, memory.shape, strict=True)) if d != dim)


_STRIDED = {"aten.scaled_dot_product_attention", "aten.matmul", "aten.transpose", "aten.permute", "aten.unsqueeze",
            "aten.expand", "aten.reshape", "aten.slice", "aten.sym_size", "aten.mul", "aten.add"}  # fmt: skip
"""Ops that read a tensor with any strides."""


def _append_in_place(node: fx.Node, output: fx.Node) -> bool:
    """Make a concatenation of an input and another value a ``cat_in_place``; returns whether the node was one."""
    if op_name(node) != "aten.cat" or len(node.args[0]) != 2:
        return False
    (old, new), dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not is_tensor(old) or not is_tensor(new) or old.op != "placeholder" or "weights" in old.meta:
        return False
    shapes = local(old), local(new)
    same = shapes[0].dtype == shapes[1].dtype and len(shapes[0].shape) == len(shapes[1].shape) > 1
    if not same or not all(u is output or op_name(u) in _STRIDED for u in node.users):
        return False
    node.target, node.args = cat_in_place, (old, new, int(dim) % len(shapes[0].shape))
    return True


_IN_PLACE = {aten.index_copy.default: aten.index_copy_.default, aten.index_put.default: aten.index_put_.default}


def _write_in_place(node: fx.Node, cache: fx.Node) -> bool:
    """Make a node that replaces rows of an input write them into the input; returns whether it was one."""
    if node.target not in _IN_PLACE or node.args[0] is not cache or local(node) != local(cache):
        return False
    if any(user is not node and op_name(user) != "aten.sym_size" for user in cache.users):
        return False
    node.target = _IN_PLACE[node.target]
    return True


def write_slice(x: torch.Tensor, slices: Sequence[tuple[Any, ...]], write: Any, *args: Any) -> torch.Tensor:
    """The tensor, after a write into a slice of it, without a gradient.

    Args:
        x: the tensor.
        slices: the dim, start, stop and step of each slice; the first is one of the tensor, each other one of the
            slice before it.
        write: ``aten.copy_`` or a similar op, which writes into the last slice.
        args: the op's other arguments.
    """
    part = x
    for bounds in slices:
        part = aten.slice.Tensor(part, *bounds)
    write(part, *args)
    return x


def _slice_arguments(node: Any, skip: int = 1) -> tuple[Any, ...]:
    """The dim, start, stop and step of a slice, after the first ``skip`` arguments."""
    args = list(node.args[skip:])
    dim, start, stop, step = args + [0, None, None, 1][len(args) :]
    return dim, start or 0, None if stop is None or stop == sys.maxsize else stop, step


def _write_slice_in_place(node: fx.Node, cache: fx.Node) -> bool:
    """Make a node that replaces a slice of an input, however nested, a ``write_slice``; returns whether it was one."""
    if local(node) != local(cache) or cache.op != "placeholder":
        return False
    slices, written, base = [], node, cache
    while op_name(written) == "aten.slice_scatter" and written.args[0] is base and not written.kwargs:
        bounds, source = _slice_arguments(written, 2), written.args[1]
        parts = [u for u in base.users if u is not written and op_name(u) != "aten.sym_size"]
        slices.append(bounds)
        if not parts:
            return _set_write_slice(node, cache, slices, aten.copy_.default, source)
        if len(parts) > 1 or op_name(parts[0]) != "aten.slice" or _slice_arguments(parts[0]) != bounds:
            return False
        written, base = source, parts[0]
        if not is_tensor(written) or set(base.users) - {written} or len(written.users) > 1:
            return False
    if not slices or written.target not in _IN_PLACE or written.args[0] is not base or written.kwargs:
        return False
    return _set_write_slice(node, cache, slices, _IN_PLACE[written.target], *written.args[1:])


def _set_write_slice(node: fx.Node, cache: fx.Node, slices: Sequence[tuple[Any, ...]], write: Any, *args: Any) -> bool:
    """Make a node a ``write_slice``; returns True."""
    node.target, node.args = write_slice, (cache, tuple(slices), write, *args)
    return True


def cache_in_place(graph: fx.Graph, written: Mapping[int, int]) -> int:
    """Write new tokens into caches without a copy of the cache, both into those that grow and into those of fixed size.

    Only for a graph that no backward follows.

    Args:
        graph: a rank's graph; changed in place.
        written: for the results that are written back into the memory of an input, that input's number.

    Returns:
        The number of results that are no longer copies.
    """
    output, inputs = graph.output_node(), graph.find_nodes(op="placeholder")
    count = 0
    for i, node in enumerate(output.args[0]):
        if is_tensor(node):
            cache = inputs[written[i]] if i in written else None
            count += _append_in_place(node, output) or (
                cache is not None and (_write_in_place(node, cache) or _write_slice_in_place(node, cache))
            )
    remove_dead_code(graph)
    return count
