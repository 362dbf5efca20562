"""adapters: methods by which a model merges adapters into its weights, or takes them away, on shards.

A layer with an adapter has ``merge`` and ``unmerge``, which add the adapter to the weight that it adapts and subtract
it; older ones merge when their mode changes (``train``). The model has ``merge_and_unload`` and ``unload``, which put
the adapted layers in the adapters' places. None of them knows of shards, and not every adapter can be merged shard by
shard: some take norms of whole rows or columns. So each layer's weights are dense while its own method runs, one layer
at a time. The ranks compare what they are about to merge.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autotp.capture.captured_graph import DenseShapes
from autotp.errors import AutoTPError, CaptureError
from autotp.modules.forward_patching import DeferredError, Guard, capturing, restore_forward
from autotp.modules.names import dotted, tied_names
from autotp.runtime.eager_region import within_graph
from autotp.runtime.generate import release_generate
from autotp.runtime.graph_cache import GraphCache
from autotp.runtime.graph_runtime import GraphRuntime
from autotp.runtime.runtime import Runtime
from autotp.utils.hashing import stable_hash
from autotp.weights.load_state_dict import forget_dense_state
from autotp.weights.registry import unregister
from autotp.weights.state_dict import forget_marks
from autotp.weights.whole_weights import whole_weights
from passes import Layout

__all__ = ["wrap_adapters"]

_MERGES = ("merge", "unmerge")
_UNLOADS = ("merge_and_unload", "unload")


def wrap_adapters(runtime: Runtime, integrate: Callable[[Runtime], None]) -> None:
    """Let adapters of a parallelized model be merged, unmerged and unloaded as those of the dense model.

    Args:
        runtime: the model's runtime.
        integrate: makes a new model, which is what unloading returns, known as this one is.
    """
    for name, module in runtime.model.named_modules():
        for method in _merging_methods(module):
            if method != "train" or any(runtime.shards(dotted(name, n)) for n in module._parameters):
                module.__dict__[method] = _Merge(runtime, name, module, method)
        if all(callable(getattr(type(module), method, None)) for method in _UNLOADS):
            for method in _UNLOADS:
                module.__dict__[method] = _Unload(runtime, name, module, method, integrate)


def _merging_methods(module: nn.Module) -> tuple[str, ...]:
    """The methods of a module that may change its weights."""
    cls = type(module)
    if all(callable(getattr(cls, method, None)) for method in _MERGES):
        return _MERGES
    return ("train",) if cls.train is not nn.Module.train else ()


class _Method:
    """A method of a module in a parallelized model, run on all ranks alike.

    Args:
        runtime: the model's runtime.
        name: the module's name in the model.
        module: the module.
        method: the method's name.
    """

    def __init__(self, runtime: Runtime, name: str, module: nn.Module, method: str) -> None:
        self.runtime, self.name, self.module, self.method = runtime, name, module, method
        self.own: Any = getattr(module, method)
        functools.update_wrapper(self, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        raise NotImplementedError

    @contextlib.contextmanager
    def on_all_ranks(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """The ranks compare the arguments before, and whether one has met an error afterwards."""
        check, doing = self.runtime.agreement.check, f"{self.method} of {self.name or 'the model'}"
        facts = {"arguments": f"{args} {sorted(kwargs.items())}"}
        check(doing, stable_hash(str(facts)), lambda: facts)
        with DeferredError() as deferred:
            yield
        check(f"end of {doing}", 0, dict, deferred.error)


class _Merge(_Method):
    """A method that changes a layer's weights; they are dense while it runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        if any(isinstance(x, torch.Tensor) for x in (*args, *kwargs.values())):
            return self.own(*args, **kwargs)  # a function of tensors, which has the same name by chance
        if capturing():
            raise CaptureError(
                f"forward calls {self.method} of {self.name}, which changes weights: call it before the model "
                "(unmerge_adapter() before disable_adapter())",
                reason=f"{self.name} calls {self.method}, which changes weights",
            )
        runtime, result = self.runtime, None
        with within_graph(), self.on_all_ranks(args, kwargs), whole_weights(
            self.module,
            lambda n: runtime.shards(dotted(self.name, n)),
            lambda n, local: runtime.whole(dotted(self.name, n), local),
            runtime.mesh.rank,
        ):  # fmt: skip
            result = self.own(*args, **kwargs)
        return result


class _Unload(_Method):
    """A method that takes adapters out of the model, and returns what is left.

    That is a parallelized model from then on. Its parameters keep their layouts, whatever they are called there.
    """

    def __init__(
        self, runtime: Runtime, name: str, module: nn.Module, method: str, integrate: Callable[[Runtime], None]
    ) -> None:
        super().__init__(runtime, name, module, method)
        self.integrate = integrate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method; the parallelized model without adapters."""
        runtime = self.runtime
        if not isinstance(runtime, GraphRuntime) or runtime.cache.state.locations:
            why = "keeps state between calls" if isinstance(runtime, GraphRuntime) else "was captured in parts"
            raise AutoTPError(
                f"{self.method} changes the structure of a {type(runtime.model).__name__} that {why}, and its graphs "
                f"would be of another model: call {self.method}() before autotp.parallelize, or merge_adapter() now"
            )
        known = _Weights(runtime)
        result = None
        with self.on_all_ranks(args, kwargs):
            result = self.own(*args, **kwargs)
            if not isinstance(result, nn.Module):
                raise AutoTPError(f"{self.method} was expected to return a module, and returned a {type(result)}")
            layouts, dense = known.named_in(result, self.method)
        assert isinstance(result, nn.Module)
        before = runtime.cache
        _release(runtime.model)
        _release(result)
        unregister(runtime)
        cache = GraphCache(result, before.tp, dense, layouts)
        cache.options = before.options
        new = GraphRuntime(result, cache, runtime.agreement, runtime.context)
        new.attach()
        self.integrate(new)
        return result


class _Weights:
    """The layouts and dense shapes of a model's parameters, by the parameters themselves."""

    def __init__(self, runtime: GraphRuntime) -> None:
        shapes, layouts = runtime.cache.captures.dense.shapes, runtime.weight_layouts
        self._of = {id(p): (p, layouts.get(n), shapes[n]) for n, p in runtime.model.named_parameters()}

    def named_in(self, model: nn.Module, method: str) -> tuple[dict[str, Layout], DenseShapes]:
        """The layouts and dense shapes by the names that the parameters have in a model.

        Raises:
            AutoTPError: a parameter is new.
        """
        layouts: dict[str, Layout] = {}
        shapes = {}
        first = tied_names(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) not in self._of:
                raise AutoTPError(
                    f"{method} has made a parameter {name}, of which autotp does not know which part this rank holds: "
                    f"call {method}() before autotp.parallelize"
                )
            _, layout, shapes[name] = self._of[id(parameter)]
            if layout is not None and first[name] == name:
                layouts[name] = layout
        return layouts, DenseShapes(shapes)


def _release(model: nn.Module) -> None:
    """Take everything off a model and its submodules that autotp has put there; parameters stay shards."""
    release_generate(model)
    forget_dense_state(model)
    forget_marks(model)
    for module in model.modules():
        if "_autotp" in module.__dict__:
            restore_forward(module)
        hooks = module._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, Guard)]:
            del hooks[key]
        for name in [n for n, value in module.__dict__.items() if isinstance(value, _Method)]:
            del module.__dict__[name]
