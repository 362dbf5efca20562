"""output_codegen: generate the function that rebuilds a call's outputs from a graph's results.

The function is generated for one structure of outputs. It also applies the call's mutations, in place, to the objects
among the arguments.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autotp.arguments.mutations import GONE, Mutation, overwrite
from autotp.arguments.object_tree import ContainerSpec, IntLeaf, TensorLeaf, build
from autotp.capture.outputs import OutputSpec
from autotp.utils.codegen import FunctionWriter
from autotp.utils.value_types import SCALARS

__all__ = ["OutputFactory", "output_function"]

OutputFunction = Callable[[Sequence[Any], Sequence[Any]], Any]


class OutputFactory:
    """Creates dicts with attributes, such as transformers' outputs, from their values.

    The constructor of such a class takes several microseconds, longer than rebuilding all other outputs. So the first
    dict that it creates is inspected. If each of its items and attributes is one of the values, or None, later dicts
    are filled directly. That is only done for classes that add fields, and no code of their own, to the common base
    class of such outputs.

    Args:
        unflatten: creates a dict the way that pytree does.
        context: pytree's context of the dict.
    """

    def __init__(self, unflatten: Callable[[Sequence[Any], Any], Any], context: Any) -> None:
        self._unflatten, self._context = unflatten, context
        self._kinds: list[type] | None = None

    def __call__(self, *values: Any) -> Any:
        """A dict with these values."""
        if list(map(type, values)) != self._kinds:
            output = self._unflatten(list(values), self._context)
            self._learn_fields(output, values)
            return output
        output = OrderedDict.__new__(self._cls)
        for key, i in self._items:
            OrderedDict.__setitem__(output, key, values[i])
        output.__dict__.update(self._fields)
        for key, i in self._attributes:
            output.__dict__[key] = values[i]
        return output

    def _learn_fields(self, output: Any, values: tuple[Any, ...]) -> None:
        """Learn which value each item and attribute of a dict is, if each is one."""
        self._kinds, positions = None, {id(x): i for i, x in enumerate(values)}
        repeated = len(positions) < len(values)  # a value that is there twice has no certain position
        tensors = any(isinstance(x, torch.Tensor) for x in values)  # else transformers may unpack the first field
        constants = any(isinstance(x, SCALARS) for x in values)
        if repeated or not tensors or constants or not _only_adds_fields(type(output)):
            return
        items, attributes = list(OrderedDict.items(output)), dict(output.__dict__)
        values_only = all(x is None or id(x) in positions for x in attributes.values())
        if all(id(x) in positions for _, x in items) and values_only:
            self._cls, self._fields = type(output), dict.fromkeys(attributes)
            self._items = [(k, positions[id(x)]) for k, x in items]
            self._attributes = [(k, positions[id(x)]) for k, x in attributes.items() if x is not None]
            self._kinds = list(map(type, values))


_CONSTRUCTORS = ("__new__", "__post_init__", "__setattr__", "__setitem__", "__getattribute__", "__init_subclass__")


def _only_adds_fields(cls: type) -> bool:
    """Whether a class is a dataclass that adds only fields to a subclass of OrderedDict."""
    mro = cls.__mro__
    if OrderedDict not in mro or cls.__new__ is not OrderedDict.__new__ or not dataclasses.is_dataclass(cls):
        return False
    for base in mro[: max(0, mro.index(OrderedDict) - 1)]:
        init: Any = vars(base).get("__init__")  # dataclasses generate theirs from a string
        if any(name in vars(base) for name in _CONSTRUCTORS) or (init and init.__code__.co_filename != "<string>"):
            return False
    return True


def _without_aliases(results: Sequence[Any], mutated: Sequence[tuple[torch.Tensor, int]]) -> Sequence[Any]:
    """Results none of which lies in memory that another result is about to overwrite.

    Args:
        results: the graph's results.
        mutated: the tensors to overwrite, each with the number of the result that is its new value.
    """
    overwriting = {old.untyped_storage().data_ptr(): i for old, i in mutated if results[i] is not old}
    if not overwriting:  # the graph has written all of them in place
        return results

    def unaliased(i: int, x: Any) -> Any:
        new = overwriting.get(x.untyped_storage().data_ptr(), i) if isinstance(x, torch.Tensor) and x.numel() else i
        return x if new == i else x.clone()

    return [unaliased(i, x) for i, x in enumerate(results)]


class _Writer(FunctionWriter):
    """Writes the function that rebuilds the outputs of one spec."""

    def __init__(self, outputs: OutputSpec) -> None:
        super().__init__(
            build=build, overwrite=overwrite, without_aliases=_without_aliases, containers=(list, tuple, dict)
        )
        self.outputs = outputs
        self._containers: dict[tuple[Any, ...], str] = {}

    def write(self) -> OutputFunction:
        """The function."""
        in_place = [(n, m) for n, m in self.outputs.mutations if m.in_place]
        if in_place:
            mutated = "".join(
                f"({self.container((n, *m.path))}[{self.literal(m.key)}], {m.new.index}), " for n, m in in_place
            )
            self.emit(f"results = without_aliases(results, [{mutated}])")
        for number, mutation in self.outputs.mutations:
            self.emit_mutation(number, mutation)
        self.emit(f"return {self.output(self.outputs.spec, iter(self.outputs.leaves))}")
        function: OutputFunction = self.build("rebuild_outputs", "results, objects")
        return function

    def container(self, path: tuple[Any, ...]) -> str:
        """The variable of the container at a path: the number of an object, then keys. Of an object it is the dict."""
        if path not in self._containers:
            item = f"objects[{path[0]}]" if len(path) == 1 else f"{self.container(path[:-1])}[{self.literal(path[-1])}]"
            name = self.variable(item)
            self._containers[path] = self.variable(f"{name} if isinstance({name}, containers) else {name}.__dict__")
        return self._containers[path]

    def emit_mutation(self, number: int, mutation: Mutation) -> None:
        """Add the lines that apply a mutation to an object."""
        container, key = self.container((number, *mutation.path)), self.literal(mutation.key)
        if mutation.new is GONE:
            self.emit(f"del {container}[{key}]")
        elif mutation.in_place:
            assert isinstance(mutation.new, TensorLeaf)
            self.emit(f"overwrite({container}, {key}, results[{mutation.new.index}])")
        elif isinstance(mutation.key, int):  # the index may be the end of a list
            value, end = self.value(mutation.new), f"len({container}) == {mutation.key}"
            self.emit(f"if isinstance({container}, list) and {end}: {container}.append({value})")
            self.emit(f"else: {container}[{key}] = {value}")
        else:
            self.emit(f"{container}[{key}] = {self.value(mutation.new)}")

    def value(self, form: Any) -> str:
        """The expression of a value of this form."""
        if isinstance(form, (TensorLeaf, IntLeaf)):
            return f"results[{form.index}]"
        return f"build({self.bind(form)}, results)" if isinstance(form, ContainerSpec) else self.bind(form.value)

    def output(self, spec: Any, leaves: Any) -> str:
        """The expression of an output.

        Args:
            spec: pytree's spec of the output.
            leaves: an iterator over its leaves.
        """
        if spec.is_leaf():
            kind, x = next(leaves)
            if kind == "argument":
                return f"objects[{x}]"
            if kind == "item":
                return f"{self.container((x[0], *x[1][:-1]))}[{self.literal(x[1][-1])}]"
            return self.value(x) if kind == "object" else f"results[{x}]" if kind == "result" else self.bind(x)
        children = [self.output(child, leaves) for child in spec.children()]
        items = "".join(f"{c}, " for c in children)
        if spec.type is tuple:
            return f"({items})"
        if spec.type is list:
            return f"[{items}]"
        if spec.type is dict:
            return f"{{{', '.join(f'{self.literal(k)}: {c}' for k, c in zip(spec.context, children, strict=True))}}}"
        unflatten = pytree.SUPPORTED_NODES[spec.type].unflatten_fn
        if OrderedDict in getattr(spec.type, "__mro__", ())[1:]:
            return f"{self.bind(OutputFactory(unflatten, spec.context))}({items})"
        return f"{self.bind(unflatten)}([{items}], {self.bind(spec.context)})"


def output_function(outputs: OutputSpec) -> OutputFunction:
    """Generate the function that rebuilds a call's outputs and applies its mutations.

    Args:
        outputs: the spec of the call's outputs.

    Returns:
        A function of the graph's results and of the objects among the call's arguments.
    """
    return _Writer(outputs).write()
