"""split: make one ``split_with_sizes`` of slices that together are the value that they are taken from.

In a backward each slice costs a tensor of zeros as large as the whole value, and a sum; the split costs one
concatenation.
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import fx

from passes.lowering.fuse_adjacent import Slice, slice_of
from passes.lowering.local_values import call, local

__all__ = ["split"]

aten = torch.ops.aten


def split(graph: fx.Graph) -> int:
    """Make one ``split_with_sizes`` of slices that together are the value that they are taken from.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        The number of calls that were saved.
    """
    parts: dict[tuple[fx.Node, int], list[tuple[Slice, fx.Node]]] = defaultdict(list)
    for node in graph.nodes:
        if (part := slice_of(node)) is not None:
            parts[part.base, part.dim].append((part, node))
    count = 0
    for (_, dim), members in parts.items():
        members.sort(key=lambda m: m[0].start)
        base = members[0][1].args[0]  # not ``Slice.base``, which an earlier split may have replaced
        ends = [0, *(p.stop for p, _ in members)]
        if len(members) < 2 or [p.start for p, _ in members] != ends[:-1] or ends[-1] != local(base).shape[dim]:
            continue
        if any(p.start == p.stop or any(u.op == "output" for u in n.users) for p, n in members):
            continue
        first = next(n for n in graph.nodes if n in {m for _, m in members})
        sizes = [p.stop - p.start for p, _ in members]
        pieces = call(first, aten.split_with_sizes.default, (base, sizes, dim), like=base, shape=local(base).shape)
        pieces.meta["local"] = None
        for i, (_, node) in enumerate(members):
            with graph.inserting_before(first):
                piece = graph.call_function(operator.getitem, (pieces, i))
            piece.meta = dict(node.meta)
            node.replace_all_uses_with(piece)
        for _, node in members:
            graph.erase_node(node)
        count += len(members) - 1
    return count
