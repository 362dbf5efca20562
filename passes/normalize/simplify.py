"""simplify: remove the nodes of a captured graph that compute nothing."""

from __future__ import annotations

import sys

from torch import fx

from passes.graphs import is_tensor, op_name, shape

__all__ = ["simplify"]

_ASSERTS = {"aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async", "aten.sym_constrain_range",
            "aten.sym_constrain_range_for_size"}  # fmt: skip
_IDENTITIES = {"aten.contiguous", "aten.clone", "aten.alias", "aten.lift_fresh", "aten.lift_fresh_copy", "aten.dropout",
               "aten.to", "aten._to_copy", "aten.slice", "aten.expand", "aten.view", "aten.reshape", "aten.detach",
               "aten.type_as", "aten.feature_dropout", "aten.alpha_dropout"}  # fmt: skip


def _is_identity(node: fx.Node) -> bool:
    """Whether a node, whose op is one of ``_IDENTITIES``, returns its input's values unchanged."""
    source = node.args[0]
    if not is_tensor(source) or not is_tensor(node):
        return False
    before, after = source.meta["val"], node.meta["val"]
    if before.dtype != after.dtype or before.device != after.device or shape(source) != shape(node):
        return False
    name = op_name(node)
    if source.op in ("placeholder", "get_attr") and any(u.op == "output" for u in node.users):
        return False  # a copy of the caller's tensor must stay a copy
    if name.endswith("dropout"):
        _, p, train = node.args
        return not train or p == 0
    if name == "aten.slice":
        bounds = list(node.args[2:])
        start, end, step = bounds + [0, sys.maxsize, 1][len(bounds) :]
        size = before.shape[node.args[1]]
        return start in (0, None) and end in (None, sys.maxsize, size if isinstance(size, int) else None) and step == 1
    if name == "aten.detach":
        return not source.meta.get("grad", True)
    return True


def _only_operand_of_cat(node: fx.Node) -> fx.Node | None:
    """The one operand of a ``cat`` that is not empty, if there is just one (beside an empty cache, say)."""
    if op_name(node) != "aten.cat":
        return None
    operands = [p for p in node.args[0] if not any(isinstance(n, int) and n == 0 for n in p.meta["val"].shape)]
    return operands[0] if len(operands) == 1 and shape(operands[0]) == shape(node) else None


def simplify(graph: fx.Graph) -> int:
    """Remove asserts, casts to a value's own dtype, copies, full slices, dropout that drops nothing, ``cat`` with
    an empty tensor, and dead code.

    Memory format and aliasing do not matter once a graph is functional (:func:`passes.functionalize`), so
    ``contiguous`` and ``clone`` go too.

    Args:
        graph: a captured graph whose nodes carry ``meta["val"]``; changed in place.

    Returns:
        The number of removed nodes.
    """
    before = len(graph.nodes)
    for node in list(graph.nodes):
        name = op_name(node)
        if name in _ASSERTS:
            graph.erase_node(node)
        elif name in _IDENTITIES and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif (operand := _only_operand_of_cat(node)) is not None:
            node.replace_all_uses_with(operand)
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return before - len(graph.nodes)
