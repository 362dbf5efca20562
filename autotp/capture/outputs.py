"""outputs: how to rebuild a call's outputs and mutations from a graph's results."""

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
    TensorLeaf,
    UnseenError,
    is_object,
    is_sharded,
    plain_leaves,
)
from autotp.arguments.snapshot import ModuleMutation
from autotp.arguments.spec import ObjectLeaf
from autotp.errors import CaptureError

__all__ = ["OutputSpec"]


Leaf = tuple[Literal["result", "argument", "item", "object", "constant"], Any]
"""The kind of an output leaf, and which it is.

The number of a result; the number of an object among the arguments; the number of such an object, with the path of a
tensor in it; the spec of an object that the call created; or a constant.
"""


@dataclass
class OutputSpec:
    """How to rebuild the outputs of a traced call, and what it does to its arguments and to the modules.

    Attributes:
        spec: pytree's spec of the outputs.
        leaves: the leaves of that spec.
        mutations: what the call changes in objects among its arguments, each with the object's number.
        slots: the slots of the results that are in objects, by the result's number.
        written: the results that are new values of a tensor in an object among the arguments: the tensor's position
            among the input tensors, by the result's number.
        own: the results that become module state.
        counts: the attributes of objects that calls count in.
        refills: the arguments, by position or keyword, that are containers into which forward puts other tensors.
        agreeing: the applied autograd Functions whose backward is the derivative of their forward.
        module_mutations: what forward changes on the model's modules, except for tracked state.
        inference: whether all of forward runs in inference mode, which a graph does not show.
    """

    spec: Any = None
    leaves: list[Leaf] = field(default_factory=list)
    mutations: list[tuple[int, Mutation]] = field(default_factory=list)
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
        """The positions of the input tensors that the call writes into."""
        in_place = [m.new.index for _, m in self.mutations if m.in_place and isinstance(m.new, TensorLeaf)]
        return frozenset(self.written[i] for i in in_place)

    def record(
        self,
        result: Any,
        objects: list[tuple[ObjectLeaf, Any]],
        object_tensors: list[tuple[int, torch.Tensor]],
        refills: set[int | str],
        written: Container[int],
    ) -> list[Any]:
        """Record the outputs and mutations of a call.

        Args:
            result: forward's result.
            objects: the objects among the arguments, each as it was before the call, and as it is now.
            object_tensors: the leaves that were in the objects, with their positions among the input tensors.
            refills: the arguments into which forward put other tensors.
            written: the ids of the leaves that forward wrote into.

        Returns:
            The results that the graph has to compute: the tensors and sizes among the outputs and in the objects.

        Raises:
            CaptureError: autotp cannot see into an output, or a mutation has no functional form.
        """
        outputs, self.spec = plain_leaves(result)
        self.leaves, self.mutations, self.slots, self.counts, self.refills = [], [], {}, set(), refills
        self.written, self.own = {}, set()
        results: list[Any] = []
        object_numbers = {id(x): i for i, (_, x) in enumerate(objects)}
        for leaf in outputs:
            if isinstance(leaf, (torch.Tensor, torch.SymInt)):
                self.leaves.append(("result", len(results)))
                results.append(leaf)
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                self.leaves.append(("constant", leaf))
            elif id(leaf) in object_numbers:
                self.leaves.append(("argument", object_numbers[id(leaf)]))
            elif is_object(leaf):
                self.leaves.append(("object", self._flatten(leaf, results)[0]))
            else:
                raise CaptureError(
                    f"the model returns a {type(leaf).__module__}.{type(leaf).__name__}, into which torch's pytree "
                    "cannot see: register it with torch.utils._pytree.register_pytree_node, or return tensors, "
                    "tuples, dicts or dataclasses registered by torch.export.register_dataclass"
                )
        items: dict[int, tuple[int, tuple[Any, ...]]] = {}
        for i, (before, x) in enumerate(objects):
            own, object_tensors = object_tensors[: len(before.slots)], object_tensors[len(before.slots) :]
            first = len(results)
            form, flattener = self._flatten(x, results)
            self.own |= set(range(first, len(results))) if isinstance(x, ModuleState) else set()
            numbers = {id(t): first + n for n, t in enumerate(flattener.leaves)}
            same = {(n, numbers[id(t)]) for n, (_, t) in enumerate(own) if id(t) in numbers}
            mutations = list(diff(before.form, form, same))
            self.mutations += [(i, mutation) for mutation in mutations]
            paths = {m.new.index: (*m.path, m.key) for m in mutations if m.in_place and isinstance(m.new, TensorLeaf)}
            if any(id(t) in written and numbers.get(id(t)) not in paths for _, t in own):
                raise CaptureError("forward writes into a tensor of an argument, and moves it to another place")
            if not is_sharded(type(x)):  # ranks keep shards of a sharded object's tensors, but return full ones
                items |= {id(t): (i, paths[numbers[id(t)]]) for _, t in own if numbers.get(id(t)) in paths}
            self.written |= {numbers[id(t)]: position for position, t in own if id(t) in numbers}
            self.counts |= flattener.counted(dict(before.numbers))
        for n, leaf in enumerate(outputs):  # an output that stays in an object is that very tensor
            if id(leaf) in written and id(leaf) in items:
                self.leaves[n] = ("item", items[id(leaf)])
        return results

    def _flatten(self, x: Any, results: list[Any]) -> tuple[ObjectSpec, ObjectFlattener]:
        """Flatten an object after the call; its leaves are added to ``results``."""
        flattener = ObjectFlattener(None, len(results))
        try:
            form = flattener.flatten(x)
        except UnseenError as error:
            raise CaptureError(
                f"the model leaves something in a {type(x).__name__} into which autotp cannot see: {error}"
            ) from error
        self.slots |= {len(results) + n: slot for n, slot in enumerate(flattener.slots(is_sharded(type(x))))}
        results += flattener.leaves
        return form, flattener
