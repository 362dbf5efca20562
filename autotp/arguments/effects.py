"""effects: the mutations and varying integers seen in a module's calls, learned once and used by every capture.

A graph is a function of tensors. A call may do more: write into arguments, count in attributes of objects, take other
integers each time, keep state on modules. Each of these becomes an input and an output of the graph once a capture has
shown it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from autotp.arguments.arguments import Arguments
from autotp.arguments.boxed import NUMBER, box
from autotp.arguments.dynamic_ints import DynamicInts
from autotp.arguments.module_state import ModuleStateTracker
from autotp.arguments.mutations import InputMutation, StateMutation
from autotp.arguments.snapshot import is_alone
from passes import Layout

__all__ = ["Effects"]


class Effects:
    """The known effects of a module's calls.

    Args:
        state: the state that the module and its submodules are known to keep between calls.
        keeps_shards: whether ranks may keep their own shards of the tensors in objects and in state.

    Attributes:
        counters: the attributes of objects that calls count in, with the objects' classes.
        mutated: the plain arguments, by position or keyword, that calls mutate.
        ints: the plain arguments that are integers and vary.
    """

    def __init__(self, state: ModuleStateTracker, keeps_shards: bool = True) -> None:
        self.state, self.keeps_shards = state, keeps_shards
        self.counters: set[tuple[type, str]] = set()
        self.mutated: set[int | str] = set()
        self.ints = DynamicInts()

    def copied(self, model: nn.Module) -> Effects:
        """The effects of a copy of the module."""
        copy = Effects(self.state.copied(model), self.keeps_shards)
        copy.counters, copy.mutated, copy.ints = set(self.counters), set(self.mutated), self.ints.copied()
        return copy

    def inside(self, module: nn.Module, path: str) -> Effects:
        """The effects of a submodule that is called by itself; it shares state and counters with this module."""
        inner = Effects(self.state.inside(module, path), self.keeps_shards)
        inner.counters = self.counters
        return inner

    @property
    def mutable(self) -> bool:
        """Whether calls mutate plain arguments, or state."""
        return bool(self.mutated or self.state.locations)

    def flatten(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], slots: Mapping[str, Layout], rank: int | None
    ) -> Arguments:
        """Flatten a call's arguments, with the state of modules among them.

        Args:
            args: the positional arguments.
            kwargs: the keyword arguments.
            slots: the layouts of the slots that ranks keep shards of, by path.
            rank: the rank that calls; None while nothing is sharded.
        """
        if boxed := self.mutated | self.ints.keys:
            args, kwargs = box(args, kwargs, boxed)
        return Arguments(args, self.with_state(kwargs), self.counters, slots, rank)

    def with_state(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keyword arguments, with the state of modules added to them."""
        return {**kwargs, **self.state.arguments()} if self.state.locations else kwargs

    def learn(self, mutation: InputMutation | StateMutation) -> bool:
        """Take a mutation into account from now on.

        Returns:
            False if the mutation is known already, or what it changes cannot be an argument.
        """
        if isinstance(mutation, InputMutation):
            new = mutation.keys - self.mutated
            self.mutated |= new
            return bool(new)
        added = self.state.add(mutation.locations)
        if added and self.state.is_visible() and is_alone(self.state):
            return True
        self.state.forget(added)
        return False

    def learn_ints(self, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Learn from a call that is about to be captured; returns whether an integer was newly found to vary.

        Args:
            key: the call's structure, which begins with the kinds of its leaves.
            args: the positional arguments.
            kwargs: the keyword arguments.
        """
        varies = self.ints.observe(key, args, kwargs)
        self.counters |= {NUMBER} if varies else set()
        return varies

    def learn_outputs(self, arguments: Arguments, captured: Any) -> bool:
        """Learn from a captured graph; returns whether it shows a counter, or a read of state, that was not known."""
        new = captured.outputs.counts - self.counters
        self.counters |= new
        return bool(new) or bool(
            self.keeps_shards and self.state.locations and self.state.learn_reads(arguments, captured.graph)
        )
