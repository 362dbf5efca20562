"""opaque: ops without a rule, which run on replicated values; the report names them."""

from __future__ import annotations

from torch import fx

from passes.graphs import is_tensor, shape
from passes.layouts.facts import Facts
from passes.layouts.units import Value
from passes.rules.base import Rule
from passes.rules.builder import Builder

__all__ = ["Opaque"]


class Opaque(Rule):
    """An op on replicated inputs. Its result is replicated too, but may be narrowed afterwards."""

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        facts.opaque(node, [n for n in node.all_input_nodes if is_tensor(n)])
        return facts.units.labelled(shape(node)) if is_tensor(node) else Value(())

    def shard(self, node: fx.Node, builder: Builder) -> None:
        builder.copy(node)
