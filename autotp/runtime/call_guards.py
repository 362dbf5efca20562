"""call_guards: a call of a known structure is bound to its graph by code generated for that structure.

Flattening a call's arguments and hashing the result takes longer than many a graph. So for each structure a function is
generated that compares the arguments in place, one after another: classes, lengths, keys, constants, and each tensor's
dtype, device and those sizes that the graph takes for constants. In doubt it gives None, and the arguments are
flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autotp.arguments.aliasing import overlapping
from autotp.arguments.arguments import Arguments
from autotp.arguments.boxed import Boxed, ModuleState
from autotp.arguments.object_tree import ConstantLeaf, ContainerSpec, IntLeaf, ObjectSpec, TensorLeaf, counted
from autotp.arguments.spec import ObjectLeaf
from autotp.capture.captured_graph import CapturedGraph
from autotp.runtime.bound_call import BoundCall, CacheEntry
from autotp.runtime.module_guards import ModuleGuards
from autotp.utils.codegen import FunctionWriter
from autotp.utils.value_types import BY_VALUE, SINGLETONS

__all__ = ["CallGuards", "call_guard", "dynamic_sizes"]

Alone = Callable[[Sequence[torch.Tensor]], bool]
Guard = Callable[[tuple[Any, ...], Mapping[str, Any]], "BoundCall | None"]

_MOST = 16
"""How many guards are tried."""


def dynamic_sizes(captured: CapturedGraph, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The sizes of the inputs that the graph does not take for constants, in order."""
    static = {(i, d) for i, d, _ in captured.static}
    return tuple(n for i, shape in enumerate(shapes) for d, n in enumerate(shape) if (i, d) not in static)


class _NoAliases:
    """Checks that mutated inputs alias nothing; cached by address, shape and stride.

    Args:
        mutated: the positions of the mutated tensors.
        alone: whether tensors share no memory with what else the module holds.
    """

    def __init__(self, mutated: frozenset[int], alone: Alone) -> None:
        self._mutated, self._alone = mutated, alone
        self._last: list[Any] = []

    def __call__(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether no mutated tensor among a call's tensors shares memory with another one."""
        now = [(x.data_ptr(), x.shape, x.stride()) for x in tensors]
        if now != self._last:
            if overlapping(tensors, self._mutated) or not self._alone([tensors[i] for i in self._mutated]):
                return False
            self._last = now
        return True


class _UnknownError(Exception):
    """A part of the arguments is of a kind that no code can be written for."""


class _Writer(FunctionWriter):
    """Writes the guard for one structure of calls.

    Args:
        entry: the graph for such calls.
        arguments: the arguments of one.
        rank: the rank.
        alone: whether tensors share no memory with what else the module holds.
    """

    def __init__(self, entry: CacheEntry, arguments: Arguments, rank: int, alone: Alone) -> None:
        super().__init__(
            counted=counted, autocast=torch.is_autocast_enabled, BoundCall=BoundCall, Tensor=torch.Tensor, entry=entry
        )
        self.arguments, self.captured, self.inputs = arguments, entry.program.captured, entry.program.inputs
        self.rank, self.alone = rank, alone
        self.static = {(i, d): n for i, d, n in self.captured.static}
        self.tensors: list[str] = []
        self.sizes: list[str] = []
        self.objects: list[str] = []
        self._numbers: dict[tuple[int, int], str] = {}
        self._states = iter(arguments.spec.states)
        self._leaves = iter(arguments.leaves)
        self._mutable = False

    def write(self) -> Guard:
        """The guard."""
        self.refuse_unless(f"autocast() is {torch.is_autocast_enabled()}")
        args, kwargs = _children(self.arguments.spec.spec)
        self.container(args, "args")
        self.container(kwargs, "kwargs")
        for i, d, j, e in self.captured.equal:
            self.refuse_unless(f"{self._numbers[i, d]} == {self._numbers[j, e]}")
        for check, places in self.captured.guards:
            self.refuse_unless(f"{self.bind(check)}({', '.join(self._numbers[p] for p in places)})")
        if self._mutable and (mutated := self.captured.outputs.overwritten):
            apart = self.bind(_NoAliases(mutated, self.alone))
            self.refuse_unless(f"{apart}(({''.join(f'{t}, ' for t in self.tensors)}))")
        tensors, objects, sizes = (
            "".join(f"{n}, " for n in names) for names in (self.tensors, self.objects, self.sizes)
        )
        self.emit(f"return BoundCall(entry, ({tensors}), ({objects}), ({sizes}))")
        function: Guard = self.build("guard", "args, kwargs", "KeyError, IndexError, AttributeError, ValueError")
        return function

    def refuse_unless(self, condition: str) -> None:
        """Emit a check: the guard holds only if this condition does."""
        self.emit(f"if not ({condition}): return None")

    def container(self, spec: Any, at: str) -> None:
        """Check a tuple, list or dict of arguments."""
        if spec.is_leaf():
            self.leaf(at)
            return
        children = _children(spec)
        if spec.type in (tuple, list):
            self.refuse_unless(f"type({at}) is {spec.type.__name__} and len({at}) == {len(children)}")
            keys: Sequence[Any] = range(len(children))
        elif issubclass(spec.type, dict) and isinstance(spec.context, list) and len(spec.context) == len(children):
            keys = spec.context
            if not all(isinstance(k, str) for k in keys):
                raise _UnknownError
            self.refuse_unless(f"type({at}) is {self.bind(spec.type)} and len({at}) == {len(children)}")
            if len(keys) > 1 and at != "kwargs":  # in another order it would be another structure
                self.refuse_unless(f"tuple({at}) == {self._order(tuple(keys))!r}")
        else:
            raise _UnknownError
        for key, child in zip(keys, children, strict=True):
            self.container(child, self.variable(f"{at}[{key!r}]"))

    def _order(self, keys: tuple[str, ...]) -> tuple[str, ...]:
        """The order in which a dict had these sorted keys."""
        orders = {o for o in self.arguments.spec.orders if sorted(o) == list(keys)}
        if len(orders) > 1:  # several dicts, of which it is not known which had which order
            raise _UnknownError
        return next(iter(orders), keys)

    def leaf(self, at: str) -> None:
        """Check a leaf of pytree's: a tensor, a constant, or an object."""
        state = next(self._states)
        if state is not None:
            self.state(state, at)
            return
        x = next(self._leaves)
        if isinstance(x, torch.Tensor):
            self.tensor(at, x)
        else:
            self.constant(at, x)

    def state(self, state: ObjectLeaf, at: str) -> None:
        """Check an object that the call may mutate."""
        leaves = [next(self._leaves) for _ in state.slots]
        names: dict[int, str] = {}
        cls = getattr(state.form, "cls", object)
        self._mutable |= issubclass(cls, (Boxed, ModuleState))
        if isinstance(state.form, ContainerSpec) and cls is Boxed:
            self.objects.append(f"{self.bind(Boxed)}({at})")
            self.form(state.form.forms[0], at, leaves, names, {})
        else:
            self.objects.append(at)
            self.form(state.form, at, leaves, names, {})
        tensors = [n for i, n in names.items() if not state.slots[i].count]
        if len(tensors) > 1:  # if two were one now, it would be another form
            self.refuse_unless(f"len({{{', '.join(f'id({n})' for n in tensors)}}}) == {len(tensors)}")

    def form(self, form: ObjectSpec, at: str, leaves: list[Any], names: dict[int, str], counts: dict[int, str]) -> None:
        """Check the content of an object."""
        if isinstance(form, ConstantLeaf):
            self.constant(at, form.value)
        elif isinstance(form, TensorLeaf):
            if form.index in names:
                self.refuse_unless(f"{at} is {names[form.index]}")
            else:
                names[form.index] = at
                self.tensor(at, leaves[form.index])
        elif isinstance(form, IntLeaf):
            if form.index in names:
                self.refuse_unless(f"type({at}) is int and {at} == {counts[form.index]}")
            else:
                self.refuse_unless(f"type({at}) is int" + "".join(f" and {at} != {c}" for c in counts.values()))
                names[form.index] = counts[form.index] = at
                self.number(at)
        else:
            self.box(form, at, leaves, names, counts)

    def box(
        self, form: ContainerSpec, at: str, leaves: list[Any], names: dict[int, str], counts: dict[int, str]
    ) -> None:
        """Check an object, list, tuple or dict."""
        if not issubclass(form.cls, (list, tuple, dict)):
            self.refuse_unless(f"type({at}) is {self.bind(form.cls)}")
            at = self.variable(f"{at}.__dict__")
            self.refuse_unless(f"len({at}) == {len(form.keys)}")
        else:
            self.refuse_unless(f"type({at}) is {self.bind(form.cls)} and len({at}) == {len(form.keys)}")
        for key, inner in zip(form.keys, form.forms, strict=True):
            if not isinstance(key, (str, int)):
                raise _UnknownError
            self.form(inner, self.variable(f"{at}[{key!r}]"), leaves, names, counts)

    def constant(self, at: str, value: Any) -> None:
        """Check a constant."""
        if isinstance(value, SINGLETONS):
            text = repr(value) if value is None or isinstance(value, bool) else self.bind(value)
            self.refuse_unless(f"{at} is {text}")
        elif isinstance(value, BY_VALUE):
            self.refuse_unless(f"type({at}) is {self.bind(type(value))} and {at} == {self.bind(value)}")
        else:  # equal floats may be of other signs, and so on
            self.refuse_unless(f"type({at}) is {self.bind(type(value))} and repr({at}) == {repr(value)!r}")

    def number(self, at: str) -> None:
        """Check an integer that varies, which a graph takes as a tensor's size."""
        place = (len(self.tensors), 0)
        self.tensors.append(f"counted({at})")
        self.size(place, at, at)

    def tensor(self, at: str, x: torch.Tensor) -> None:
        """Check a tensor."""
        i = len(self.tensors)
        self.tensors.append(at)
        kind = "Tensor" if type(x) is torch.Tensor else self.bind(type(x))
        on = {"cpu": f"{at}.is_cpu", "cuda": f"{at}.is_cuda"}.get(
            x.device.type, f"{at}.device.type == {x.device.type!r}"
        )
        self.refuse_unless(
            f"type({at}) is {kind} and {at}.dtype is {self.bind(x.dtype)} and {on} and "
            f"{at}.requires_grad is {x.requires_grad}"
        )
        if not x.dim():
            self.refuse_unless(f"not {at}.dim()")
            return
        names = [f"s{i}_{d}" for d in range(x.dim())]
        self.emit(f"{', '.join(names)}, = {at}.shape")
        layout = self.inputs.get(i)
        for d, name in enumerate(names):
            shards = layout.dims.get(d) if layout is not None else None
            if shards is not None:  # this rank's shard; other sizes would be refused
                self.refuse_unless(f"{name} == {shards.counts[self.rank]}")
                self._numbers[i, d] = str(shards.size)
                if (i, d) not in self.static:
                    self.sizes.append(str(shards.size))
            else:
                self.size((i, d), name, name)

    def size(self, place: tuple[int, int], at: str, name: str) -> None:
        """Check a size, if the graph takes it for a constant; else it is one of the call's dynamic sizes."""
        self._numbers[place] = name
        if place in self.static:
            self.refuse_unless(f"{at} == {self.static[place]}")
        else:
            self.refuse_unless(f"{at} > 1")
            self.sizes.append(name)


class CallGuards:
    """The guards generated for a module's calls, the one that held last tried first.

    Args:
        modules: the guards of the modules that the graphs depend on.
    """

    def __init__(self, modules: Sequence[ModuleGuards]) -> None:
        self._modules = modules
        self._guards: list[tuple[Guard, CacheEntry, list[str]]] = []

    def clear(self) -> None:
        """Forget all guards."""
        self._guards.clear()

    def add(self, entry: CacheEntry, arguments: Arguments, rank: int, alone: Alone) -> None:
        """Generate the guard for calls like one, if code can be written for it.

        Args:
            entry: the graph for such calls.
            arguments: the call's.
            rank: the rank.
            alone: whether tensors share no memory with what else the module holds.
        """
        texts = [m.text for m in self._modules]
        if any(e is entry and t == texts for _, e, t in self._guards):  # the guard of this structure, or one like it
            return
        if (guard := call_guard(entry, arguments, rank, alone)) is not None:
            self._guards.insert(0, (guard, entry, texts))
            del self._guards[_MOST:]

    def match(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BoundCall | None:
        """A call whose guard holds, bound to its graph; None if none does, or a module has changed."""
        for i, (guard, _, texts) in enumerate(self._guards):
            if (call := guard(args, kwargs)) is None:
                continue
            for modules, text in zip(self._modules, texts, strict=True):
                if not modules.quick_check() or modules.text != text:
                    return None
            if i:
                self._guards.insert(0, self._guards.pop(i))
            return call
        return None


def _children(spec: Any) -> list[Any]:
    children: list[Any] = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    return children


def call_guard(entry: CacheEntry, arguments: Arguments, rank: int, alone: Alone = lambda tensors: True) -> Guard | None:
    """A function that binds calls of one structure to their graph, and gives None for all others.

    Args:
        entry: the graph.
        arguments: the arguments of such a call.
        rank: the rank.
        alone: whether tensors share no memory with what else the module holds.

    Returns:
        None where no code can be written for this structure: an argument is of a kind that only pytree knows, or a
        value that ranks keep shards of was given dense.
    """
    for i, layout in entry.program.inputs.items():
        if any(s.counts[rank] != s.size for _, s in layout.shards) and not arguments.is_part(arguments.tensors[i]):
            return None
    try:
        return _Writer(entry, arguments, rank, alone).write()
    except _UnknownError:
        return None
