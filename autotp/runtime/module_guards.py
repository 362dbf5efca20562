"""module_guards: what has changed on a model's modules since its graphs were captured.

A graph refers to tensors by name and holds everything else as it was at capture. So each call checks that the model is
still what was captured. Modes, dtypes and plain attributes that changed (and lists, sets and dicts of plain values,
:mod:`autotp.runtime.plain_containers`) lead to another graph. Parameters and buffers
are read where they are. Modules, hooks or forwards that changed are an error. A model that is captured in parts runs
its own Python around them: that may change freely, as long as the parts stay the same modules.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from autotp.errors import AutoTPError
from autotp.modules.device import compute_device
from autotp.modules.forward_patching import own_forward, repatch_forward
from autotp.modules.hooks import HOOKS, refuse_global_hooks
from autotp.modules.names import dotted
from autotp.runtime.dict_versions import DictVersions
from autotp.runtime.generate_attributes import generate_attributes
from autotp.runtime.plain_containers import PLAIN, PlainContainers
from autotp.runtime.saved_attributes import NOTES, is_noted_dtype
from autotp.utils.hashing import stable_hash
from autotp.utils.value_types import DTENSOR, is_a

__all__ = ["ModuleGuards"]

_KIND, _TRAINABLE = operator.attrgetter("dtype", "device"), operator.attrgetter("requires_grad")
_FORWARD = operator.itemgetter("forward")

Attribute = tuple[str, str]
"""A module's name and an attribute's; a buffer's name and ``""``."""


class ModuleGuards:
    """Guards on the modules of a model, checked before each call: identities first, values where one has changed.

    Args:
        model: the model.
        shape: the shape that a parameter should have here, by name.
        parts: the modules that run as graphs, by path, each with guards of its own; None: the model is one graph.
        path: the name of the model in messages, if it is a part itself.
        state_names: gives the names of the state on a module, by the module's name; graphs take state as arguments.

    Attributes:
        known: names of parameters that must be there before the first check.
        text: the result of the last check.
        seen: a token of the last check; the same object as long as nothing changes.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: Callable[[str], Sequence[int]],
        parts: Mapping[str, nn.Module] | None = None,
        path: str = "",
        state_names: Callable[[str], frozenset[str]] = lambda module: frozenset(),
    ) -> None:
        self.model, self._shape, self._parts, self.path, self._state_names = model, shape, parts, path, state_names
        self._attributes: dict[Attribute, Any] = {}
        self._first: dict[Attribute, Any] = {}
        self._last: Any = None
        self.known: Iterable[str] = ()
        self._base: dict[Attribute, Any] | None = None
        self._empty_at_base: set[str] = set()
        self._versions = DictVersions(())
        self.seen: Any = None
        self._trainable: tuple[Any, int] = None, 0
        self.text = ""

    def rebase(self) -> None:
        """Take the modules, hooks, forwards and tied parameters of now as those that the graphs were captured with.

        Attributes that have changed since the last check (capture leaves some behind) count as captured, too.
        """
        before = self._attributes
        self._scan()
        self._base, self._ties = self._facts(), self._tied()
        self._empty_at_base = {n for n, p in self.model.named_parameters() if p.is_meta}
        first = {**self._first, **dict(self._attributes.items() - before.items())}
        self._first = {p: x for p, x in first.items() if p in self._attributes or not self._is_kept(*p)}
        self._changes, self.seen = self._differing(), None

    def rebase_if_changed(self) -> None:
        """Take changes since the last check as captured: the model's own forward has made them."""
        if self._snapshot() != self._last:
            self.rebase()

    def check(self) -> str:
        """The differences from capture as a text: calls with equal texts share their graphs.

        Raises:
            AutoTPError: something has changed that no graph can follow. The next check raises it again.
        """
        refuse_global_hooks()
        if self._base is None:  # of a copy, which may have been changed before its first call
            if "_autotp" not in self.model.__dict__:  # weights may be yet to be read
                self._empty_at_base = {n for n, p in self.model.named_parameters() if p.is_meta}
            self._raise_if_not_sharded()
            self.rebase()
        elif (now := self._snapshot()) is None or now != self._last:
            self._scan()
            self._last = None
            self._raise_if_changed()
            self._scan()
            self._changes = self._differing()
        kinds = {f"{dtype} {compute_device(device).type}" for dtype, device in set(map(_KIND, self._parameters))}
        self.text = f"{sorted(kinds)} {sorted(self._changes.items()) if self._changes else ''}"
        self._versions, self.seen = DictVersions(self._set), self._quick_state()
        return self.text

    def quick_check(self) -> bool:
        """Whether nothing has changed since the last check, as version numbers and addresses show: attributes of
        modules and configs, tensors and their addresses, registered hooks. False in doubt."""
        if self.seen is None or self._quick_state() != self.seen or not self._containers.same():
            return False
        if not self._versions.same():  # something was set, perhaps to what it was
            now = DictVersions(self._set)
            if self._snapshot() != self._last:
                return False
            self._versions, self.seen = now, self._quick_state()
        return True

    def _quick_state(self) -> tuple[Any, ...]:
        """A value that stays equal until a tensor moves, a hook is registered, or an empty dict is filled."""
        return (
            any(self._none),
            RemovableHandle.next_id,  # one more for each hook
            list(map(torch.Tensor.numel, self._parameters)),
            list(map(torch.Tensor.data_ptr, self._parameters)),  # a cast or a move gives others
        )

    def trainable(self) -> tuple[bool, ...]:
        """Per parameter, whether it needs a gradient. Graphs serve both cases, but ranks must agree."""
        return tuple(map(_TRAINABLE, self._parameters))

    def trainable_hash(self) -> int:
        """A hash of :meth:`trainable`."""
        trainable = self.trainable()
        if trainable != self._trainable[0]:
            self._trainable = trainable, stable_hash(str(trainable))
        return self._trainable[1]

    def changes(self) -> dict[Attribute, str]:
        """The values of the plain attributes that differ from capture, by module and name."""
        return dict(self._changes)

    def _scan(self) -> None:
        """List everything that is guarded, and take a snapshot of it."""
        modules = list(self.model.named_modules())
        self._dicts = [m.__dict__ for _, m in modules]
        own = self._own()
        dicts = own + [d[kind] for d in self._dicts[1:] for kind in HOOKS]  # the model's own hooks run around the graph
        self._replaced = [d for d in self._dicts if "_autotp" in d]
        self._configs: list[tuple[dict[str, Any], str, Any]] = []  # the last is kept, so that no id comes twice
        self._full, self._empty = [d for d in dicts if d], [d for d in dicts if not d]
        self._none = [d for d in own if not d]
        self._parameters = list(self.model.parameters())
        self._attributes = {}
        self._getters: list[tuple[Callable[[Any], Any], dict[str, Any]]] = []
        self._containers = PlainContainers()
        seen: set[int] = set()
        for name, module in modules:
            cls: Any = type(module)
            skipped = generate_attributes(cls) | self._state_names(name)
            self._add_attributes(name, module.__dict__, seen, skipped)
            for key, value in module.__dict__.items():
                ours = key == "_autotp" or key in skipped
                if hasattr(value, "__dict__") and not callable(value) and not ours:  # a config
                    self._configs.append((module.__dict__, key, value.__dict__))
                    self._add_attributes(dotted(name, key), value.__dict__, seen, NOTES)
        for name, buffer in self.model.named_buffers():
            if not self._is_kept(name, ""):
                self._attributes[name, ""] = f"{tuple(buffer.shape)} {buffer.dtype}"
        of_modules = set(map(id, self._dicts))
        configs = [d for _, d in self._getters if id(d) not in of_modules]
        self._set = [*self._dicts, *filter(None, own), *configs, *self._containers.versioned]
        self._kept = list(chain.from_iterable(map(dict.values, self._full)))  # so that no id comes twice
        self._last = self._snapshot()

    def _is_kept(self, name: str, key: str) -> bool:
        """Whether an attribute of a module, or of an object on it, or a buffer, is state that graphs take as
        argument."""
        holders = itertools.accumulate(name.split("."), "{}.{}".format)
        names = [("", name), *((h, name[len(h) + 1 :]) for h in holders)]
        return any(
            (rest.partition(".")[0] if rest else key) in self._state_names(module)
            for module, rest in names
            if rest or key
        )

    def _own(self) -> list[dict[str, Any]]:
        """The dicts in which modules keep submodules, parameters and buffers."""
        return [d[k] for d in self._dicts for k in ("_modules", "_parameters", "_buffers")]

    def _add_attributes(
        self, name: str, attributes: dict[str, Any], seen: set[int], skipped: frozenset[str] = frozenset()
    ) -> None:
        if id(attributes) in seen:
            return
        seen.add(id(attributes))
        containers = self._containers.add(attributes, skipped)
        self._attributes |= {(name, k): content for k, content in containers.items()}
        if names := [k for k, v in attributes.items() if isinstance(v, PLAIN) and k not in skipped]:
            self._attributes |= {(name, k): attributes[k] for k in names}
            self._getters.append((operator.itemgetter(*names), attributes))

    def _snapshot(self) -> Any:
        """Values and identities that stay equal as long as nothing changes; None if an attribute is gone."""
        try:
            values = [[get(d) for get, d in self._getters], self._containers.content()]
            forwards = list(map(_FORWARD, self._replaced))
            configs = [id(d[key].__dict__) for d, key, _ in self._configs]
        except (AttributeError, KeyError):
            return None
        identities = list(map(id, chain(self._own(), *map(dict.values, self._full))))
        sizes = list(map(torch.Tensor.numel, self._parameters))
        return list(map(len, self._dicts)), any(self._empty), identities, values, sizes, forwards, configs

    def _facts(self) -> dict[Attribute, Any]:
        """Everything that must not change: submodules, their hooks and forwards; of a model with parts, the parts."""
        facts: dict[Attribute, Any] = {}
        if self._parts is not None:
            modules = dict(self.model.named_modules(remove_duplicate=False))
            return {(path, "module"): modules.get(path) for path in self._parts}
        for name, module in self.model.named_modules():
            if name:
                facts[name, "module"] = module
                facts[name, "a forward of its own"] = own_forward(module)
                facts |= {(name, what): list(module.__dict__[kind].values()) for kind, what in HOOKS.items()}
        return facts

    def _raise_if_changed(self) -> None:
        repatch_forward(self.model)
        facts, base = self._facts(), self._base or {}
        for attribute in sorted(base.keys() | facts.keys(), key=lambda a: (a[1] != "module", *a)):
            before, now = base.get(attribute), facts.get(attribute)
            if before is now or (isinstance(before, list) and before == now):
                continue
            name, what = dotted(self.path, attribute[0]), attribute[1]
            raise AutoTPError(
                f"{name} {_changed_module(before, now) if what == 'module' else f'got or lost {what}'} since "
                "autotp.parallelize: the graph is of what was there, so this would change nothing. Undo it, or do it "
                "before parallelize (hooks: on the model itself)"
            )
        names = self._tied()
        for name in () if self._parts is not None else sorted(names.keys() | self._ties.keys()):
            if name not in names or name not in self._ties:
                raise AutoTPError(
                    f"{self._called(name)} was {'added' if name in names else 'removed'} since autotp.parallelize, and "
                    "the graph does not know of it: do this before parallelize"
                )
            if names[name] != self._ties[name]:
                tied = name != self._ties[name]
                other, were, now = (self._ties[name], "one", "two") if tied else (names[name], "two", "one")
                raise AutoTPError(
                    f"the parameters {name} and {other} were {were} when the model was parallelized and are {now} now: "
                    f"assign {'the same Parameter' if tied else 'each its own'}, or change this before parallelize"
                )
        self._raise_if_not_sharded()

    def _raise_if_not_sharded(self) -> None:
        if missing := set(self.known) - {n for n, _ in self.model.named_parameters(remove_duplicate=False)}:
            raise AutoTPError(
                f"{self._called(min(missing))} was removed since autotp.parallelize, and graphs would take what is in "
                "its place for the dense weight: do this before parallelize"
            )
        self.known = ()
        for name, parameter in self.model.named_parameters():
            if is_a(parameter, DTENSOR):
                raise AutoTPError(
                    f"{self._called(name)} has become a DTensor since autotp.parallelize: with FSDP2 call the module "
                    "that fully_shard was given, which must be the whole model; nothing else may split it again"
                )
            if parameter.is_meta and name not in self._empty_at_base:
                raise AutoTPError(
                    f"{self._called(name)} is on the meta device now, and has no values: parallelize reads weights "
                    "from a checkpoint (weights=...); afterwards load_state_dict(assign=True) replaces them"
                )
            try:
                local = tuple(self._shape(name))
            except KeyError:
                raise AutoTPError(
                    f"{self._called(name)} was added since autotp.parallelize, and the graph does not know of it: do "
                    "this before parallelize"
                ) from None
            if tuple(parameter.shape) != local:
                raise AutoTPError(
                    f"{self._called(name)} has shape {tuple(parameter.shape)}, but this rank holds {local} of it: "
                    "load_state_dict takes dense tensors and shards them, an assignment does not"
                )

    def _called(self, name: str) -> str:
        return f"parameter {dotted(self.path, name)}"

    def _tied(self) -> dict[str, str]:
        first: dict[int, str] = {}
        return {n: first.setdefault(id(p), n) for n, p in self.model.named_parameters(remove_duplicate=False)}

    def _differing(self) -> dict[Attribute, str]:
        first, now = self._first, self._attributes
        attributes = now.keys() | first.keys() if now != first else ()
        dtypes = {p.dtype for p in self._parameters} if attributes else ()
        return {
            k: repr(now.get(k))
            for k in attributes
            if now.get(k) != first.get(k) and not is_noted_dtype(k[1], now.get(k), dtypes)
        }


def _changed_module(before: nn.Module | None, now: nn.Module | None) -> str:
    """The change of a submodule, in words."""
    if before is None:
        return f"({type(now).__name__}) was added"
    if now is None:
        return f"({type(before).__name__}) was removed"
    return f"was replaced, a {type(before).__name__} by a {type(now).__name__},"
