"""giving: what a call gives back, put together of a graph's results by code that is made for this one form.

The objects that were passed get what the call changes in them, in place.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from autotp.arguments.mutations import GONE, Mutation, overwrite
from autotp.arguments.object_tree import ContainerSpec, IntLeaf, TensorLeaf, build
from autotp.utils.codegen import FunctionWriter
from autotp.utils.value_types import SCALARS

if TYPE_CHECKING:
    from autotp.capture.outputs import OutputSpec

__all__ = ["OutputFactory", "output_function"]

OutputFunction = Callable[[Sequence[Any], Sequence[Any]], Any]


class OutputFactory:
    """Makes a dict with attributes, as transformers' outputs are, of its values.

    Its constructor takes several microseconds, more than all else that a call gives back. So what the first one made is
    looked at, and where each item and attribute is one of the values, or None, the next ones are filled likewise. Only
    of classes that add fields, and no code of their own, to the one that all such outputs have in common.

    Args:
        unflatten: makes one, as pytree would.
        context: what pytree keeps beside the values.
    """

    def __init__(self, unflatten: Callable[[Sequence[Any], Any], Any], context: Any) -> None:
        self._unflatten, self._context = unflatten, context
        self._kinds: list[type] | None = None

    def __call__(self, *values: Any) -> Any:
        """Such a dict of these values."""
        if list(map(type, values)) != self._kinds:
            made = self._unflatten(list(values), self._context)
            self._learn(made, values)
            return made
        made = OrderedDict.__new__(self._cls)
        for key, at in self._items:
            OrderedDict.__setitem__(made, key, values[at])
        made.__dict__.update(self._fields)
        for key, at in self._attributes:
            made.__dict__[key] = values[at]
        return made

    def _learn(self, made: Any, values: tuple[Any, ...]) -> None:
        self._kinds, places = None, {id(x): i for i, x in enumerate(values)}
        several = len(places) < len(values)  # which of two places a value belongs to does not show
        tensors = any(isinstance(x, torch.Tensor) for x in values)  # else a first field may be taken apart
        if several or not tensors or any(isinstance(x, SCALARS) for x in values) or not _only_adds_fields(type(made)):
            return
        items, attributes = list(OrderedDict.items(made)), dict(made.__dict__)
        if all(id(x) in places for _, x in items) and all(x is None or id(x) in places for x in attributes.values()):
            self._cls, self._fields = type(made), dict.fromkeys(attributes)
            self._items = [(k, places[id(x)]) for k, x in items]
            self._attributes = [(k, places[id(x)]) for k, x in attributes.items() if x is not None]
            self._kinds = list(map(type, values))


_MAKES = ("__new__", "__post_init__", "__setattr__", "__setitem__", "__getattribute__", "__init_subclass__")


def _only_adds_fields(cls: type) -> bool:
    """Whether a class is a dataclass below one that is made of OrderedDict, and has no code that makes it."""
    mro = cls.__mro__
    if OrderedDict not in mro or cls.__new__ is not OrderedDict.__new__ or not dataclasses.is_dataclass(cls):
        return False
    for each in mro[: max(0, mro.index(OrderedDict) - 1)]:
        own: Any = vars(each).get("__init__")  # dataclasses write theirs
        if any(name in vars(each) for name in _MAKES) or (own and own.__code__.co_filename != "<string>"):
            return False
    return True


def _without_aliases(results: Sequence[Any], written: Sequence[tuple[torch.Tensor, int]]) -> Sequence[Any]:
    """Results in memory of their own, if they lie in that of a tensor that is about to get another of them."""
    places = {old.untyped_storage().data_ptr(): i for old, i in written if results[i] is not old}
    if not places:  # all were written where they are
        return results

    def one(i: int, x: Any) -> Any:
        lies_in = places.get(x.untyped_storage().data_ptr(), i) if isinstance(x, torch.Tensor) and x.numel() else i
        return x if lies_in == i else x.clone()

    return [one(i, x) for i, x in enumerate(results)]


class _Writer(FunctionWriter):
    def __init__(self, outputs: OutputSpec) -> None:
        super().__init__(build=build, overwrite=overwrite, apart=_without_aliases, containers=(list, tuple, dict))
        self.outputs = outputs
        self._reached: dict[tuple[Any, ...], str] = {}

    def write(self) -> OutputFunction:
        inside = [(n, c) for n, c in self.outputs.mutations if c.in_place]
        if inside:
            held = "".join(
                f"({self.reached((n, *c.path))}[{self.literal(c.key)}], {c.new.index}), "  # type: ignore[union-attr]
                for n, c in inside
            )
            self.emit(f"results = apart(results, [{held}])")
        for number, change in self.outputs.mutations:
            self.change(number, change)
        self.emit(f"return {self.tree(self.outputs.spec, iter(self.outputs.leaves))}")
        function: OutputFunction = self.build("give", "results, objects")
        return function

    def reached(self, path: tuple[Any, ...]) -> str:
        """The variable of what is at a place in the objects; of an object the dict of its attributes."""
        if path not in self._reached:
            at = f"objects[{path[0]}]" if len(path) == 1 else f"{self.reached(path[:-1])}[{self.literal(path[-1])}]"
            name = self.variable(at)
            self._reached[path] = self.variable(f"{name} if isinstance({name}, containers) else {name}.__dict__")
        return self._reached[path]

    def change(self, number: int, change: Mutation) -> None:
        at, key = self.reached((number, *change.path)), self.literal(change.key)
        if change.new is GONE:
            self.emit(f"del {at}[{key}]")
        elif change.in_place:
            assert isinstance(change.new, TensorLeaf)
            self.emit(f"overwrite({at}, {key}, results[{change.new.index}])")
        elif isinstance(change.key, int):  # a list, which may be as long as its next place
            value = self.form(change.new)
            self.emit(f"if isinstance({at}, list) and len({at}) == {change.key}: {at}.append({value})")
            self.emit(f"else: {at}[{key}] = {value}")
        else:
            self.emit(f"{at}[{key}] = {self.form(change.new)}")

    def form(self, form: Any) -> str:
        if isinstance(form, (TensorLeaf, IntLeaf)):
            return f"results[{form.index}]"
        return f"build({self.bind(form)}, results)" if isinstance(form, ContainerSpec) else self.bind(form.value)

    def tree(self, spec: Any, leaves: Any) -> str:
        if spec.is_leaf():
            kind, x = next(leaves)
            if kind == "given":
                return f"objects[{x}]"
            if kind == "inside":
                return f"{self.reached((x[0], *x[1][:-1]))}[{self.literal(x[1][-1])}]"
            return self.form(x) if kind == "made" else f"results[{x}]" if kind == "result" else self.bind(x)
        children = [self.tree(child, leaves) for child in spec.children()]
        inner = "".join(f"{c}, " for c in children)
        if spec.type is tuple:
            return f"({inner})"
        if spec.type is list:
            return f"[{inner}]"
        if spec.type is dict:
            return f"{{{', '.join(f'{self.literal(k)}: {c}' for k, c in zip(spec.context, children, strict=True))}}}"
        unflatten = pytree.SUPPORTED_NODES[spec.type].unflatten_fn
        if OrderedDict in getattr(spec.type, "__mro__", ())[1:]:
            return f"{self.bind(OutputFactory(unflatten, spec.context))}({inner})"
        return f"{self.bind(unflatten)}([{inner}], {self.bind(spec.context)})"


def output_function(outputs: OutputSpec) -> OutputFunction:
    """A function of a graph's results, and of the objects that the call was passed, that gives what the model gives.

    Args:
        outputs: how it goes together.
    """
    return _Writer(outputs).write()
