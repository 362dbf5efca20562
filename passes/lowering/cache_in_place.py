"""cache_in_place: caches of keys and values are not copied for each token: those that grow get it in memory that has
room behind them, and those of one size where it belongs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import is_tensor, local, remove_dead_code

__all__ = ["cache_in_place", "grown", "overwritten"]

aten = torch.ops.aten

_LEAST = 32
_SHARE = 8
"""Room is left for this many more along the dim, or for one of so many of what is there, whichever is more."""


_ROOM = "_autotp_room"
"""The attribute of a tensor that has room behind it: the memory, and the length of it, along the dim that grows, that
is in use by one tensor or by several that begin alike. A list, so that these share it, and files can have it."""


def grown(old: torch.Tensor, new: torch.Tensor, dim: int) -> torch.Tensor:
    """``torch.cat((old, new), dim)``, without a gradient, and without a copy of ``old`` where there is room behind it.

    What :func:`grown` returns has room behind it. It is written there once: another value that is put behind the same
    ``old`` later goes, with a copy of ``old``, elsewhere. So a tensor keeps its values when a longer one is made of it;
    but the two share memory, and what is written into one afterwards is in the other, too.

    Args:
        old: ``(..., n, ...)``.
        new: ``(..., m, ...)``, of the same dtype.
        dim: the dim that grows.

    Returns:
        ``(..., n + m, ...)``, whose strides leave room in that dim.
    """
    begin, end = old.shape[dim], old.shape[dim] + new.shape[dim]
    room = getattr(old, _ROOM, None)
    if room is None or room[1] != begin or end > room[0].shape[dim] or not _lies_in(old, room[0], dim):
        shape = list(old.shape)
        shape[dim] = end + max(_LEAST, end // _SHARE)
        room = [old.new_empty(shape), begin]
        room[0].narrow(dim, 0, begin).copy_(old)
    memory: torch.Tensor = room[0]
    memory.narrow(dim, begin, end - begin).copy_(new)
    room[1] = end
    result = memory.narrow(dim, 0, end)
    setattr(result, _ROOM, room)  # goes where the tensor goes, into its deep copies, too
    return result


def _lies_in(old: torch.Tensor, memory: torch.Tensor, dim: int) -> bool:
    """Whether a tensor still is the beginning of a memory, which may be written to now."""
    if memory.is_inference() and not torch.is_inference_mode_enabled():
        return False
    alike = old.data_ptr() == memory.data_ptr() and old.stride() == memory.stride() and old.dtype == memory.dtype
    return alike and all(a == b for d, (a, b) in enumerate(zip(old.shape, memory.shape, strict=True)) if d != dim)


_READERS = {"aten.scaled_dot_product_attention", "aten.matmul", "aten.transpose", "aten.permute", "aten.unsqueeze",
            "aten.expand", "aten.reshape", "aten.slice", "aten.sym_size", "aten.mul", "aten.add"}  # fmt: skip
"""Ops that read a tensor whatever its strides are."""


def _grows(node: fx.Node, output: fx.Node) -> bool:
    """Let what is an input and something behind it grow in place."""
    if op_name(node) != "aten.cat" or len(node.args[0]) != 2:
        return False
    (old, new), dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not is_tensor(old) or not is_tensor(new) or old.op != "placeholder" or "weights" in old.meta:
        return False
    shapes = local(old), local(new)
    alike = shapes[0].dtype == shapes[1].dtype and len(shapes[0].shape) == len(shapes[1].shape) > 1
    if not alike or not all(u is output or op_name(u) in _READERS for u in node.users):
        return False
    node.target, node.args = grown, (old, new, int(dim) % len(shapes[0].shape))
    return True


_IN_PLACE = {aten.index_copy.default: aten.index_copy_.default, aten.index_put.default: aten.index_put_.default}


def _overwrites(node: fx.Node, held: fx.Node) -> bool:
    """Let what goes back into an input, with some of its rows replaced, be written there at once."""
    if node.target not in _IN_PLACE or node.args[0] is not held or local(node) != local(held):
        return False
    if any(user is not node and op_name(user) != "aten.sym_size" for user in held.users):
        return False
    node.target = _IN_PLACE[node.target]
    return True


def overwritten(held: torch.Tensor, places: Sequence[tuple[Any, ...]], put: Any, *what: Any) -> torch.Tensor:
    """A tensor, of which a part is written over, without a gradient.

    Args:
        held: the tensor.
        places: the slices, one of the other, that the part is: dim, start, stop and step of each.
        put: ``aten.copy_`` or the like, which writes into the part.
        what: what else that is called with.
    """
    part = held
    for place in places:
        part = aten.slice.Tensor(part, *place)
    put(part, *what)
    return held


def _slice_of(node: Any, skip: int = 1) -> tuple[Any, ...]:
    """The dim, start, stop and step of a slice."""
    given = list(node.args[skip:])
    dim, start, stop, step = given + [0, None, None, 1][len(given) :]
    return dim, start or 0, None if stop is None or stop == sys.maxsize else stop, step


def _overwrites_part(node: fx.Node, held: fx.Node) -> bool:
    """Let what goes back into an input, with a slice of it replaced, or a slice of that, be written there at once."""
    if local(node) != local(held) or held.op != "placeholder":
        return False
    places, written, base = [], node, held
    while op_name(written) == "aten.slice_scatter" and written.args[0] is base and not written.kwargs:
        place, source = _slice_of(written, 2), written.args[1]
        parts = [u for u in base.users if u is not written and op_name(u) != "aten.sym_size"]
        places.append(place)
        if not parts:
            return _put(node, held, places, aten.copy_.default, source)
        if len(parts) > 1 or op_name(parts[0]) != "aten.slice" or _slice_of(parts[0]) != place:
            return False
        written, base = source, parts[0]
        if not is_tensor(written) or set(base.users) - {written} or len(written.users) > 1:
            return False
    if not places or written.target not in _IN_PLACE or written.args[0] is not base or written.kwargs:
        return False
    return _put(node, held, places, _IN_PLACE[written.target], *written.args[1:])


def _put(node: fx.Node, held: fx.Node, places: Sequence[tuple[Any, ...]], put: Any, *what: Any) -> bool:
    node.target, node.args = overwritten, (held, tuple(places), put, *what)
    return True


def cache_in_place(graph: fx.Graph, written: Mapping[int, int]) -> int:
    """Let caches take new tokens without a copy of what they hold: those that grow, and those of one size.

    Only for a graph that no backward follows.

    Args:
        graph: a rank's graph; changed in place.
        written: the results that go back into the memory of an input, by its number.

    Returns:
        How many results are no longer copies.
    """
    output, inputs = graph.output_node(), graph.find_nodes(op="placeholder")
    count = 0
    for i, node in enumerate(output.args[0]):
        if is_tensor(node):
            held = inputs[written[i]] if i in written else None
            count += _grows(node, output) or (
                held is not None and (_overwrites(node, held) or _overwrites_part(node, held))
            )
    remove_dead_code(graph)
    return count
