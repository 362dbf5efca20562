"""graph_hash: a hash of a graph's computation, which does not depend on the order of its nodes.

Iteration over a set has another order in every process, so the ranks' graphs of one call may have the same nodes in
another order. Only collectives and random draws must have the same order on all ranks.
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
    """A number that is equal for graphs with the same computation, and with collectives and draws in the same order.

    Args:
        graph: a rewritten graph.
        constants: the graph's own tensors, which are hashed by value, not by name.
    """
    hashes: dict[str, str] = {}
    steps = []
    inputs = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            text, inputs = f"input {inputs}", inputs + 1
        elif node.op == "get_attr" and node.target in constants:
            text = f"constant {checksum(constants[node.target]):x}"
        else:
            target = f"{node.op} {node._pretty_print_target(node.target)}"
            text = f"{target} {_format_arg(node.args)} {_format_arg(node.kwargs)}"
        hashes[node.name] = f"{stable_hash(re.sub(r'%([A-Za-z_0-9]+)', lambda m: hashes[m[1]], text)):x}"
        if node.op == "output" or node.target in _ORDERED:
            steps.append(hashes[node.name])
    return stable_hash(" ".join(steps))
