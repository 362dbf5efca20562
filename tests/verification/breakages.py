"""Ways to break a rewritten graph, for the tests that must notice."""

from __future__ import annotations

import operator

from torch import fx


def strip(graph: fx.Graph, node: fx.Node) -> None:
    """Take a collective out: who read its result reads what went into it."""
    if isinstance(node.args[0], tuple):  # several values that enter together
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(node.args[0][user.args[1]])
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)
