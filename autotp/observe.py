"""observe: one run of the dense model, to see what each module is called with and whose code reads which weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autotp.arguments import Arguments
from autotp.inputs import device_of
from autotp.keeping import left_as_it_was, storage_of

__all__ = ["Call", "Observed", "Touches", "observe"]

_GETTERS = ("dtype", "device", "layout", "requires_grad", "ndim", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_mps",
            "is_xpu", "is_sparse", "is_quantized", "names", "grad_fn", "output_nr")  # fmt: skip
_QUESTIONS: list[Any] = [
    torch.Tensor.dim, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.get_device,
    torch.Tensor.__hash__, torch.is_floating_point, torch.is_complex, torch.is_tensor,
]  # fmt: skip
_HARMLESS = {*_QUESTIONS, *(getattr(torch.Tensor, name).__get__ for name in _GETTERS if hasattr(torch.Tensor, name))}
"""What says the same of a weight and of each of its shards."""
_SCALES = {torch.Tensor.mul_, torch.Tensor.div_, torch.Tensor.__imul__, torch.Tensor.__itruediv__}
"""What does to each shard what it does to the weight, if it does that by a number."""


class Touches(TorchFunctionMode):
    """A mode that reports each torch function that is given one of some tensors, unless a shard would do as well.

    Args:
        tensors: the tensors to watch.
        report: called with such a tensor and the function, before it runs.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], report: Callable[[torch.Tensor, Any], None]) -> None:
        super().__init__()
        self._watched = {id(t): t for t in tensors}
        self._report = report
        self.suspended = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments, then call the function."""
        if not self.suspended and func not in _HARMLESS and not (func in _SCALES and _by_a_number(args, kwargs)):
            for value in (*args, *(kwargs or {}).values()):
                for each in value if isinstance(value, (tuple, list)) else (value,):
                    if id(each) in self._watched:
                        self._report(each, func)
        return func(*args, **(kwargs or {}))


def _by_a_number(args: Any, kwargs: Any) -> bool:
    return not kwargs and len(args) == 2 and isinstance(args[1], (int, float))


class _Dispatched(TorchDispatchMode):
    """Reports parameters by their storage, as they reach ops without a torch function: from scripted code, say."""

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


def _apart(value: Any) -> Any:
    """A tensor without the graph that made it; anything else as it is."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Call:
    """A call of a module.

    Attributes:
        args: the positional arguments; tensors apart from the graphs that made them.
        kwargs: the keyword arguments.
        running: the modules (ids) whose forwards it was made in.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    running: frozenset[int] = frozenset()


@dataclass
class Observed:
    """What a run showed.

    Attributes:
        calls: the calls of each module, by its id.
        touched: for each parameter, by its id, the modules (ids) that were running when code read it.
    """

    calls: dict[int, list[Call]] = field(default_factory=dict)
    touched: dict[int, set[frozenset[int]]] = field(default_factory=dict)


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observed:
    """Run a dense model once and watch it. Its weights, buffers, state and the random numbers stay as they were.

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
            of = Arguments(args, kwargs)  # containers may be refilled later
            own_args, own_kwargs = of.spec.close([_apart(x) for x in of.leaves])
            observed.calls.setdefault(id(module), []).append(Call(own_args, own_kwargs, frozenset(stack)))
            stack.append(id(module))
            try:
                return own(*args, **kwargs)
            finally:
                stack.pop()

        return forward

    of = Arguments(args, kwargs)
    own_args, own_kwargs = of.spec.close(
        [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in of.leaves]
    )
    device = device_of(model)
    parameters = list(model.parameters())
    modes = Touches(parameters, touch), _Dispatched(parameters, touch)
    with left_as_it_was(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.__dict__["forward"] = watched(module)
        with modes[0], modes[1]:
            model(*own_args, **own_kwargs)
    return observed
