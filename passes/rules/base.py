"""base: the class of all rules, and the registry of rules by op."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from passes.layouts.facts import Facts
from passes.layouts.units import Value
from passes.rules.builder import Builder

__all__ = ["Rule", "register", "registered"]


class Rule:
    """A rule for one kind of op: how labels pass through it, and how it is sharded.

    ``propagate`` labels the result. ``shard`` emits, through the :class:`~passes.rules.builder.Builder`, the node that
    computes each rank's shard of the result.
    """

    def propagate(self, node: fx.Node, facts: Facts) -> Value:
        """The labelled result of ``node``; its tensor inputs are already in ``facts.values``."""
        raise NotImplementedError

    def shard(self, node: fx.Node, builder: Builder) -> None:
        """Emit the rewritten node that stands for ``node``."""
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
