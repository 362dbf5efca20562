"""grow: caches of keys and values are not copied for each token: those that grow get it in memory that has room
behind them, and those of one size where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.values import is_tensor, local

__all__ = ["grow", "grown"]

aten = torch.ops.aten

_LEAST = 32
_SHARE = 8
"""Room is left for this many more along the dim, or for one of so many of what is there, whichever is more."""


@dataclass
class _Room:
    """Memory of which a beginning is in use, by one tensor or by several that begin alike.

    Attributes:
        memory: all of it.
        used: the length, along the dim that grows, of the longest of them.
    """

    memory: torch.Tensor
    used: int


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
    room: _Room | None = getattr(old, "_autotp_room", None)
    begin, end = old.shape[dim], old.shape[dim] + new.shape[dim]
    if room is None or room.used != begin or end > room.memory.shape[dim] or not _can_write(room.memory):
        shape = list(old.shape)
        shape[dim] = end + max(_LEAST, end // _SHARE)
        room = _Room(old.new_empty(shape), begin)
        room.memory.narrow(dim, 0, begin).copy_(old)
    room.memory.narrow(dim, begin, end - begin).copy_(new)
    room.used = end
    result = room.memory.narrow(dim, 0, end)
    result._autotp_room = room  # type: ignore[attr-defined]  # goes where the tensor goes, into its deep copies, too
    return result


def _can_write(memory: torch.Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not memory.is_inference()


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


def _overwrites(node: fx.Node, held: fx.Node) -> bool:
    """Let what goes back into an input, with some of its rows replaced, be written there at once."""
    if node.target is not aten.index_copy.default or node.args[0] is not held or local(node) != local(held):
        return False
    if any(user is not node and op_name(user) != "aten.sym_size" for user in held.users):
        return False
    node.target = aten.index_copy_.default
    return True


def grow(graph: fx.Graph, written: Mapping[int, int]) -> int:
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
            count += _grows(node, output) or (i in written and _overwrites(node, inputs[written[i]]))
    return count
