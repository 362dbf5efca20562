"""Op rules: one class per family of ops, each in a file of its own.

========================  =======================================================
``pointwise``             ops that compute index by index: add, mul, gelu, where, casts
``random``                dropout and other random numbers
``movement``              views, transposes, slices, windows, expands
``joins``                 cat, stack, pad
``contraction``           products: linear, matmul, addmm, einsum
``convolution``           products that vary along a dim: convolutions, grouped matrices
``attention``             scaled dot-product attention
``reduction``             sums, means, softmax, sorts
``normalization``         layer, RMS and group norms
``lookup``                embeddings and gathers
``loss``                  cross entropy
``opaque``                everything else: on replicated values, named in the report
========================  =======================================================

Rules emit their nodes through the ``builder``; it inserts each ``conversion`` that they need. A rule itself is the
class in ``base``, where the registry is too; ``alignment`` matches the dims of operands.
"""

from __future__ import annotations

import torch
from torch import fx

from passes.graphs import is_tensor, op_name
from passes.layouts.facts import Facts
from passes.rules import (
    attention,
    contraction,
    convolution,
    joins,
    lookup,
    loss,
    movement,
    normalization,
    opaque,
    pointwise,
    random,
    reduction,
)
from passes.rules.alignment import Alignment, Key
from passes.rules.base import Rule, registered

__all__ = ["Alignment", "Facts", "Key", "Rule", "rule_of"]

_FAMILIES = (attention, contraction, convolution, joins, lookup, loss, movement, normalization, random, reduction)
_POINTWISE = pointwise.Pointwise()
_OPAQUE = opaque.Opaque()


def rule_of(node: fx.Node) -> Rule:
    """The rule for a node: the one registered for its op, or the pointwise one if torch tags the op as pointwise, or
    else the opaque one, which needs replicated inputs."""
    if node.op == "call_function" and is_tensor(node):
        rule = registered(op_name(node))
        if rule is not None:
            return rule
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            return _POINTWISE
    return _OPAQUE
