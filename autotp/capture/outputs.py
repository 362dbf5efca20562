"""outputs: how a call's outputs and mutations are made of a graph's results."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from autotp.arguments.boxed import ModuleState
from autotp.arguments.mutations import Mutation, diff
from autotp.arguments.object_tree import (
    ObjectFlattener,
    ObjectSpec,
    Slot,
    UnseenError,
    is_object,
    is_sharded,
    plain_leaves,
)
from autotp.arguments.object_tree import TensorLeaf as FormLeaf
from autotp.arguments.snapshot import ModuleMutation
from autotp.arguments.spec import ObjectLeaf
from autotp.errors import CaptureError

__all__ = ["OutputSpec"]


Leaf = tuple[Literal["result", "given", "inside", "made", "constant"], Any]


@dataclass
class OutputSpec:
    """How the outputs of a traced call go together: export undoes what forward sets on the module itself.

    Attributes:
        spec: pytree's.
        leaves: per leaf of it, whether and which it is of the results, of the objects that were passed, of what is in
            these (the object's number, and the way there), and of constants and objects made in the call.
        mutations: what the call changes in objects that were passed, each with the object's number.
        slots: for each result that is in an object its place there, and whether ranks keep their own shares of it.
        written: the results that go back into the memory of a tensor that an object held, by its number among the
            input tensors.
        own: the results that the modules keep from now on.
        counts: the attributes of objects that count.
        refills: the arguments, by number or keyword, that are containers into which forward puts other tensors.
        agreeing: classes whose backward agrees with the derivative of their forward.
        module_mutations: what forward has changed of what the model's modules hold.
        inference: whether all of forward runs in inference mode, which a graph does not show.
    """

    spec: Any = None
    leaves: list[Leaf] = field(default_factory=list)
    diff: list[tuple[int, Mutation]] = field(default_factory=list)
    slots: dict[int, Slot] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    counts: set[tuple[type, str]] = field(default_factory=set)
    refills: set[int | str] = field(default_factory=set)
    agreeing: Container[type] = ()
    module_mutations: list[ModuleMutation] = field(default_factory=list)
    inference: bool = False

    @property
    def overwritten(self) -> frozenset[int]:
        """The input tensors, by number, that the call writes into."""
        inside = [c.new.index for _, c in self.mutations if c.in_place and isinstance(c.new, FormLeaf)]
        return frozenset(self.written[i] for i in inside)

    def take(
        self,
        result: Any,
        objects: list[tuple[ObjectLeaf, Any]],
        held: list[tuple[int, torch.Tensor]],
        refills: set[int | str],
        written: Container[int],
    ) -> list[Any]:
        """Note how what forward returned, and left in objects, goes together of the results, which are returned.

        Args:
            result: what forward returned.
            objects: the objects that it was passed, as they were and as they are.
            held: the leaves that were in them, and their numbers among the input tensors.
            refills: see above.
            written: the ids of the tensors among the leaves that forward has written into.
        """
        outputs, self.spec = plain_leaves(result)
        self.leaves, self.mutations, self.slots, self.counts, self.refills = [], [], {}, set(), refills
        self.written, self.own = {}, set()
        results: list[Any] = []
        given = {id(x): i for i, (_, x) in enumerate(objects)}
        for leaf in outputs:
            if isinstance(leaf, (torch.Tensor, torch.SymInt)):
                self.leaves.append(("result", len(results)))
                results.append(leaf)
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                self.leaves.append(("constant", leaf))
            elif id(leaf) in given:
                self.leaves.append(("given", given[id(leaf)]))
            elif is_object(leaf):
                self.leaves.append(("made", self._left(leaf, results)[0]))
            else:
                raise CaptureError(
                    f"the model returns a {type(leaf).__module__}.{type(leaf).__name__}, into which torch's pytree "
                    "cannot see: register it with torch.utils._pytree.register_pytree_node, or return tensors, "
                    "tuples, dicts or dataclasses registered by torch.export.register_dataclass"
                )
        inside: dict[int, tuple[int, tuple[Any, ...]]] = {}
        for i, (state, x) in enumerate(objects):
            own, held = held[: len(state.slots)], held[len(state.slots) :]
            first = len(results)
            form, opener = self._left(x, results)
            self.own |= set(range(first, len(results))) if isinstance(x, ModuleState) else set()
            tensors = {id(t): first + n for n, t in enumerate(opener.leaves)}
            same = {(n, tensors[id(t)]) for n, (_, t) in enumerate(own) if id(t) in tensors}
            found = list(diff(state.form, form, same))
            self.mutations += [(i, change) for change in found]
            stays = {c.new.index: (*c.path, c.key) for c in found if c.in_place and isinstance(c.new, FormLeaf)}
            if any(id(t) in written and tensors.get(id(t)) not in stays for _, t in own):
                raise CaptureError("forward writes into a tensor that it is given, and puts it elsewhere")
            if not is_sharded(type(x)):  # where ranks keep shares, what is returned is made whole
                inside |= {id(t): (i, stays[tensors[id(t)]]) for _, t in own if tensors.get(id(t)) in stays}
            self.written |= {tensors[id(t)]: number for number, t in own if id(t) in tensors}
            self.counts |= opener.counted(dict(state.numbers))
        for n, leaf in enumerate(outputs):  # what is returned and stays in an object is one tensor
            if id(leaf) in written and id(leaf) in inside:
                self.leaves[n] = ("inside", inside[id(leaf)])
        return results

    def _left(self, x: Any, results: list[Any]) -> tuple[ObjectSpec, ObjectFlattener]:
        """The form in which forward leaves an object, whose leaves are results."""
        opener = ObjectFlattener(None, len(results))
        try:
            form = opener.flatten(x)
        except UnseenError as error:
            raise CaptureError(
                f"the model leaves something in a {type(x).__name__} into which autotp cannot see: {error}"
            ) from error
        self.slots |= {len(results) + n: slot for n, slot in enumerate(opener.slots(is_sharded(type(x))))}
        results += opener.leaves
        return form, opener
