"""meaning: a number for what a graph computes, in whatever order it is written.

Python that goes through a set takes another order in every process, so the ranks' graphs of one call may have the
same nodes in other places. What must have one order on all ranks is what communicates, and what draws random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import fx
from torch.fx.node import _format_arg

from autotp.utils.hashing import checksum, stable_hash
from passes import ops
from passes.ops.registry import COLLECTIVES

__all__ = ["graph_hash"]

_ORDERED = {*(op for op, c in COLLECTIVES.items() if c.communicates), ops.random_same, ops.random_per_rank}


def graph_hash(graph: fx.Graph, constants: Mapping[str, torch.Tensor]) -> int:
    """The same number for two graphs that compute, exchange and draw the same, and that in the same order.

    Args:
        graph: a rewritten graph.
        constants: the tensors that it has of its own, which count by value, not by name.
    """
    meanings: dict[str, str] = {}
    steps = []
    inputs = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            text, inputs = f"input {inputs}", inputs + 1
        elif node.op == "get_attr" and node.target in constants:
            text = f"constant {checksum(constants[node.target]):x}"
        else:
            called = f"{node.op} {node._pretty_print_target(node.target)}"
            text = f"{called} {_format_arg(node.args)} {_format_arg(node.kwargs)}"
        meanings[node.name] = f"{stable_hash(re.sub(r'%([A-Za-z_0-9]+)', lambda m: meanings[m[1]], text)):x}"
        if node.op == "output" or node.target in _ORDERED:
            steps.append(meanings[node.name])
    return stable_hash(" ".join(steps))
