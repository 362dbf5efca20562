"""base: what a rule is, and the registry of rules by op."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from passes.layouts.facts import Facts
from passes.layouts.units import Value
from passes.rules.builder import Builder

__all__ = ["Rule", "register", "registered"]


class Rule:
    """How labels pass through one kind of op, and what stands for the op in the rewritten graph.

    ``propagate`` gives the labelled value of the result. ``shard`` emits, through the
    :class:`~passes.shard.Builder`, the node that computes each rank's part of the result.
    """

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        """Label the result of ``node``, whose tensor inputs are already in ``facts.values``."""
        raise NotImplementedError

    def shard(self, node: fx.Node, builder: Builder) -> None:
        """Emit what stands for ``node``."""
        raise NotImplementedError


_RULES: dict[str, Rule] = {}


def register(*names: str) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: this rule is for the ops of these names (``aten.add``)."""

    def add(rule: type[Rule]) -> type[Rule]:
        for name in names:
            assert name not in _RULES, name
            _RULES[name] = rule()
        return rule

    return add


def registered(name: str) -> Rule | None:
    """The rule registered for ops of this name, if any."""
    return _RULES.get(name)
