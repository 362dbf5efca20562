"""generate: a model's own ``generate`` runs on every rank, with the same arguments and the same random numbers.

``generate`` is Python around calls of the model. It must do the same on all ranks, down to the tokens that it samples.
So the ranks compare its arguments before it begins, all draw rank 0's random numbers, and compare the results at its
end.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autotp.arguments.arguments import Arguments
from autotp.arguments.object_tree import ConstantLeaf, ContainerSpec, ObjectSpec
from autotp.distributed.random_state import rank_0_draws
from autotp.modules.device import device_of
from autotp.modules.forward_patching import DeferredError
from autotp.runtime.broadcast_inputs import broadcast_inputs
from autotp.runtime.runtime import Runtime
from autotp.utils.hashing import preview, stable_hash
from autotp.utils.value_types import is_constant

__all__ = ["Generate", "release_generate", "wrap_generate"]

_OF_THIS_RANK = ("streamer", "synced_gpus")
"""Arguments that do not change the generated tokens, and may differ between ranks."""


def wrap_generate(runtime: Runtime) -> None:
    """Let a model's ``generate``, if it has one, do the same on all ranks."""
    own = getattr(runtime.model, "generate", None)
    if not inspect.ismethod(own) or inspect.isgeneratorfunction(own):
        return
    attributes = runtime.model.__dict__
    attributes["generate"] = Generate(own, runtime)
    for name in ("get_compiled_call", "_get_static_cache_init_shape"):  # of transformers
        if callable(getattr(runtime.model, name, None)):
            attributes[name] = _Replacement(runtime.model, name)


def release_generate(model: nn.Module) -> None:
    """Undo :func:`wrap_generate`."""
    for key in [k for k, value in model.__dict__.items() if isinstance(value, (Generate, _Replacement))]:
        del model.__dict__[key]


class _Replacement:
    """Replaces a method of transformers on a parallelized model.

    ``generate`` compiles calls with a static cache, and may allocate such a cache before the first call. A graph is
    compiled already, and makes this rank's shard of the cache itself.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.__call__ if self.name == "get_compiled_call" else None


class Generate:
    """A model's ``generate`` on all ranks; its signature is the model's own.

    Args:
        own: the model's own ``generate``, a bound method.
        runtime: the model's runtime.
    """

    def __init__(self, own: Any, runtime: Runtime) -> None:
        self.runtime, self._running = runtime, False
        functools.update_wrapper(self, own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``, on all ranks alike."""
        own: Any = self.__wrapped__  # type: ignore[attr-defined]
        if self._running:  # it calls itself, with arguments that all ranks have
            return own(*args, **kwargs)
        agreement = self.runtime.agreement
        facts = self._facts(args, kwargs)
        if not agreement.check("generate", stable_hash(str(facts)), dict, inputs=lambda: facts):
            args, kwargs = broadcast_inputs(agreement, args, kwargs, device_of(self.runtime.model))
            facts = self._facts(args, kwargs)
            agreement.check("generate", stable_hash(str(facts)), lambda: facts)
        result, deferred = None, DeferredError()
        self._running = True
        try:
            with deferred, rank_0_draws(agreement, {torch.device("cpu"), device_of(self.runtime.model)}):
                result = own(*args, **kwargs)
        finally:
            self._running = False
        tokens = {
            f"values of result{pytree.keystr(p)}": preview(x) for p, x in _tensors(result) if not x.is_floating_point()
        }
        agreement.check("end of generate", stable_hash(str(tokens)), lambda: tokens, deferred.error)
        return result

    def _facts(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, str]:
        """A description of each argument, in which ranks must agree."""
        named = self._named(args, kwargs)
        config = getattr(self.runtime.model, "generation_config", None)
        configs = {"model.generation_config": config} if config is not None else {}
        return dict(_described(self.runtime.arguments((), named | configs)))

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            bound = inspect.signature(self).bind(*args, **kwargs)
        except TypeError:  # the call itself will raise it
            return {f"args[{i}]": x for i, x in enumerate(args)} | dict(kwargs)
        named: dict[str, Any] = {}
        for name, x in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            named |= x if kind is inspect.Parameter.VAR_KEYWORD else {name: x}
        return {n: x for n, x in named.items() if n not in _OF_THIS_RANK and x is not None}


def _tensors(result: Any) -> list[tuple[Any, torch.Tensor]]:
    return [(p, x) for p, x in pytree.tree_flatten_with_path(result)[0] if isinstance(x, torch.Tensor)]


def _described(arguments: Arguments) -> Iterator[tuple[str, str]]:
    """Arguments in words: tensors by their values, objects by the constants in them."""
    spec, shapes = arguments.spec, iter(arguments.shapes)
    for i, (path, x) in enumerate(zip(spec.paths(), arguments.leaves, strict=True)):
        name = _argument_name(path)
        if not isinstance(x, torch.Tensor):
            yield name, _text(x)
            continue
        shape = tuple(next(shapes))
        by_shape = (i in spec.slots and spec.slots[i].count) or arguments.is_split(x)
        yield name, f"{shape} {x.dtype}" if by_shape else f"{shape} {x.dtype} {preview(x)}"
    for path, state in zip(spec.places(), spec.states, strict=True):
        yield from _constants(_argument_name(path), state.form) if state is not None else ()


def _argument_name(path: str) -> str:
    """The name by which ``generate`` knows an argument."""
    return path.removeprefix("kwargs['").replace("']", "", 1)


def _constants(name: str, form: ObjectSpec) -> Iterator[tuple[str, str]]:
    """The constants in an object, by path. Private ones are left out: they may be hashes that differ between
    processes."""
    if isinstance(form, ConstantLeaf):
        yield name, form.text
    elif isinstance(form, ContainerSpec):
        for key, item in form.items.items():
            if not str(key).startswith("_"):
                yield from _constants(f"{name}.{key}", item)


def _text(x: Any) -> str:
    """An argument in words: a constant by its repr, anything else by its class and its plain attributes."""
    if is_constant(x):
        return repr(x)
    plain = {k: v if is_constant(v) else preview(v) for k, v in getattr(x, "__dict__", {}).items() if _is_plain(v)}
    items = f" of {', '.join(map(_text, x))}" if isinstance(x, (list, tuple)) else ""
    return f"a {type(x).__module__}.{type(x).__qualname__} {plain if plain else ''}{items}".strip()


def _is_plain(x: Any) -> bool:
    return is_constant(x) or isinstance(x, torch.Tensor)
