"""module_calls: one observed run of the dense model: the calls of each module, and the readers of each weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autotp.arguments.arguments import Arguments
from autotp.arguments.snapshot import restoring, storage_of
from autotp.modules.device import device_of
from autotp.runtime.eager_region import ParameterReads

__all__ = ["Call", "Observed", "observe"]


class _Dispatched(TorchDispatchMode):
    """Reports parameters that reach ops without a torch function, as from scripted code, by their storage."""

    supports_higher_order_operators = True

    def __init__(self, parameters: Iterable[nn.Parameter], report: Callable[[torch.Tensor, Any], None]) -> None:
        super().__init__()
        self._report = report
        self._watched: dict[Any, list[nn.Parameter]] = {}
        for p in parameters:
            self._watched.setdefault(storage_of(p), []).append(p)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                for parameter in self._watched.get(storage_of(value), ()):
                    self._report(parameter, func)
        return func(*args, **(kwargs or {}))


def _detached(value: Any) -> Any:
    """A tensor without its autograd graph; anything else as it is."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Call:
    """A call of a module.

    Attributes:
        args: the positional arguments; tensors are detached.
        kwargs: the keyword arguments.
        running: the ids of the modules whose forwards were running.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    running: frozenset[int] = frozenset()


@dataclass
class Observed:
    """The observations of one run.

    Attributes:
        calls: the calls of each module, by its id.
        touched: for each parameter, by its id, the ids of the modules that were running when code read it.
    """

    calls: dict[int, list[Call]] = field(default_factory=dict)
    touched: dict[int, set[frozenset[int]]] = field(default_factory=dict)


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observed:
    """Run a dense model once and observe it. Weights, buffers, state and random numbers stay as they were.

    Args:
        model: the model, with real weights.
        args: positional inputs; the run gets copies.
        kwargs: keyword inputs.
    """
    observed = Observed()
    stack: list[int] = []

    def touch(parameter: torch.Tensor, _: Any) -> None:
        observed.touched.setdefault(id(parameter), set()).add(frozenset(stack))

    def watched(module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            flat = Arguments(args, kwargs)  # containers may be refilled later
            own_args, own_kwargs = flat.spec.unflatten([_detached(x) for x in flat.leaves])
            observed.calls.setdefault(id(module), []).append(Call(own_args, own_kwargs, frozenset(stack)))
            stack.append(id(module))
            try:
                return own(*args, **kwargs)
            finally:
                stack.pop()

        return forward

    flat = Arguments(args, kwargs)
    own_args, own_kwargs = flat.spec.unflatten(
        [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in flat.leaves]
    )
    device = device_of(model)
    parameters = list(model.parameters())
    modes = ParameterReads(parameters, touch), _Dispatched(parameters, touch)
    with restoring(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.__dict__["forward"] = watched(module)
        with modes[0], modes[1]:
            model(*own_args, **own_kwargs)
    return observed
