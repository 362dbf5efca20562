"""optimizer_probe: test by experiment whether an optimizer's step on an element reads other elements.

A copy of the optimizer takes steps on a small made-up parameter, and other copies take them on its two parts. An
optimizer that works element by element moves the parts as it moves the whole. One that takes a norm, a mean or a
product of a whole matrix does not: on shards it would train another model than the dense one, without a sign of it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import random
import threading
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from autotp.distributed.random_state import get_state, set_state

__all__ = ["UntestableError", "moves_parts_otherwise"]

_SIZES = (7, 6, 5, 4)
"""The sizes of the made-up parameter's dims: small, and different."""
_SCALES = (1e-2, 1.0, 1e2, 1e6)
"""How large the gradient of each step is, so that a bound on its norm is met on both sides."""
_LARGEST = 1 << 20
"""The most elements that a tensor among an optimizer's attributes may have, for it to be copied."""
_lock = threading.RLock()

Makers = Callable[[nn.Parameter], Optimizer]


class UntestableError(Exception):
    """The optimizer cannot be tried out; the message says why."""


def moves_parts_otherwise(
    optimizer: Optimizer, group: dict[str, Any], parameter: torch.Tensor, dims: Collection[int]
) -> int | None:
    """The first dim by which a parameter must not be split, as its parts would be moved otherwise; None without one.

    The optimizer, its state, its hooks and all random generators are afterwards as they were.

    Args:
        optimizer: the optimizer.
        group: one of its parameter groups, whose options the test takes.
        parameter: a parameter of the group; the test takes place on its device, with as many dims.
        dims: the dims to cut.

    Raises:
        UntestableError: the optimizer does not run on the made-up parameter, or does not move it.
    """
    if parameter.device.type == "meta":
        raise UntestableError("its parameters have no values")
    if parameter.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UntestableError("its first step is captured into a CUDA graph")
    shape = [*_SIZES, *[3] * parameter.dim()][: parameter.dim()]
    copied, constructed = _by_copy(optimizer, parameter), _by_constructor(optimizer, group, parameter)
    failure: Exception | None = None
    with _undisturbed(parameter.device):
        for dtype, make, closure in itertools.product(
            (torch.float64, torch.float32), (copied, constructed), _closures(type(optimizer))
        ):
            try:
                return _first_wrong_cut(make, closure, shape, dtype, parameter.device, sorted(dims))
            except Exception as error:
                failure = failure or error
    named = "" if isinstance(failure, UntestableError) else f"{type(failure).__name__}: "
    raise UntestableError(f"{named}{failure}") from failure


def _first_wrong_cut(
    make: Makers, closure: bool, shape: list[int], dtype: torch.dtype, device: torch.device, dims: list[int]
) -> int | None:
    """The first of the dims by which two parts are moved otherwise than the whole."""
    start, gradients = (t.to(device, dtype) for t in _made_up(shape))
    start_state = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(0).get_state()

    def moved(start: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """The parameter before the first step, and after each."""
        set_state(device, start_state)
        parameter = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
        optimizer, after = make(parameter), [start]
        for gradient in gradients:
            _step(optimizer, parameter, gradient, closure)
            after.append(parameter.detach().clone())
        return torch.stack(after)

    whole = moved(start, gradients)
    steps, values = whole.diff(dim=0).flatten(1).abs().amax(1), whole[1:].flatten(1).abs().amax(1)
    rounding = torch.finfo(dtype).eps * (values + whole[:-1].flatten(1).abs().amax(1))
    if not bool(((steps > 1e3 * rounding) & values.isfinite()).any()):
        raise UntestableError("it does not move a made-up parameter")
    for dim in dims:
        at = max(1, shape[dim] // 3)
        sizes = [at, shape[dim] - at]
        pairs = zip(start.split(sizes, dim), gradients.split(sizes, dim + 1))
        parts = torch.cat([moved(*pair) for pair in pairs], dim + 1)
        apart = (whole - parts)[1:].flatten(1).abs().amax(1)
        if bool((values.isfinite() & ~(apart <= 1e-4 * steps + 16 * rounding)).any()):
            return dim
    return None


def _made_up(shape: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A parameter and a gradient for each step, the same on every rank; rows and columns differ in size.

    The first gradient is orthogonal to each row, as there are optimizers that look for that.
    """
    generator = torch.Generator().manual_seed(20)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = torch.randn([len(_SCALES), *shape], generator=generator, dtype=torch.float64)
    for dim, size in enumerate(shape):
        wide = [size if d == dim else 1 for d in range(len(shape))]
        sizes = torch.logspace(-0.5, 0.5, size, dtype=torch.float64).view(wide)
        start, gradients = start * sizes.flip(dim), gradients * sizes
    if len(shape) > 1:
        gradients[0] -= (gradients[0] * start).sum(-1, True) / start.square().sum(-1, True) * start
    scales = torch.tensor(_SCALES, dtype=torch.float64)
    return start, gradients * scales.view(-1, *[1] * len(shape))


def _closures(kind: type[Optimizer]) -> tuple[bool, ...]:
    """Whether to pass a closure to ``step``, in the order to try."""
    parameters = list(inspect.signature(kind.step).parameters.values())[1:]
    required = any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return (True,) if required else (False, True) if parameters else (False,)


def _step(optimizer: Optimizer, parameter: nn.Parameter, gradient: torch.Tensor, closure: bool) -> None:
    """One step; by the class's function, as schedulers replace the instance's."""
    step: Callable[..., Any] = type(optimizer).step
    parameter.grad = gradient.clone(memory_format=torch.contiguous_format)

    def loss() -> torch.Tensor:
        parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
        return torch.ones((), dtype=gradient.dtype, device=gradient.device)

    step(optimizer, loss) if closure else step(optimizer)


class _NoCollectives(TorchDispatchMode):
    """Refuses collectives: in the middle of a test the other ranks might not join, or not be in a test at all."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise UntestableError(f"its step has a collective ({func.name()})")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Run a test without gradients, hooks, collectives and warnings, and put all random generators back afterwards."""
    none: OrderedDict[int, Any] = OrderedDict()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock)
        for one in {torch.device("cpu"), device}:
            stack.callback(set_state, one, get_state(one))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
            stack.enter_context(mock.patch.object(torch_optimizer, name, none))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_NoCollectives())
        yield


def _by_copy(optimizer: Optimizer, parameter: torch.Tensor) -> Makers:
    return lambda made_up: _Copy(optimizer, parameter, made_up).of_optimizer(optimizer)


def _by_constructor(optimizer: Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> Makers:
    """For optimizers whose constructor makes state (Adagrad): a new one, with the arguments that can be found."""

    def make(made_up: nn.Parameter) -> Optimizer:
        copier, kind = _Copy(optimizer, parameter, made_up), type(optimizer)
        known = {**vars(optimizer), **optimizer.defaults, **group}
        names = [n for n in list(inspect.signature(kind).parameters)[1:] if n in known]
        arguments = {n: copier.of_value(known[n]) for n in names if n != "params"}
        return kind([copier.of_group(group)], **arguments)

    return make


class _Copy:
    """Copies an optimizer so that it has one parameter, no state and no hooks, and shares nothing with the original.

    Args:
        optimizer: the optimizer.
        parameter: the parameter that is replaced; all others are left out.
        made_up: what it is replaced by.
    """

    def __init__(self, optimizer: Optimizer, parameter: torch.Tensor, made_up: nn.Parameter) -> None:
        self._parameter, self._made_up = parameter, made_up
        self._others = {id(p) for g in optimizer.param_groups for p in g["params"]} - {id(parameter)}
        self._memo: dict[int, Any] = {id(parameter): made_up, **dict.fromkeys(self._others, made_up)}

    def of_optimizer(self, original: Optimizer) -> Optimizer:
        """A copy of the optimizer, or of another that it holds."""
        result: Optimizer = object.__new__(type(original))
        self._memo[id(original)] = result
        attributes: dict[str, Any] = {}
        for name in ("param_groups", "state"):  # first, as wrappers have those of the optimizer that they hold
            if name in vars(original):
                attributes[name] = self._shared(name, vars(original)[name])
        for name, value in vars(original).items():
            replaced = callable(value) and hasattr(type(original), name)  # such as `step` by a scheduler
            if name in attributes or name in ("found_inf", "grad_scale") or replaced:
                continue
            hooks = name.startswith("_optimizer_") and name.endswith("_hooks")
            attributes[name] = OrderedDict() if hooks else self.of_value(value)
        if "differentiable" in attributes.get("defaults", {}):
            attributes["defaults"]["differentiable"] = False
        vars(result).update(attributes)
        return result

    def _shared(self, name: str, value: Any) -> Any:
        if id(value) not in self._memo:
            groups = [g for g in value if any(p is self._parameter for p in g["params"])] if name != "state" else []
            factory = value.default_factory if isinstance(value, defaultdict) else dict
            self._memo[id(value)] = defaultdict(factory) if name == "state" else [self.of_group(g) for g in groups]
        return self._memo[id(value)]

    def of_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter group of the made-up parameter, with the same options; a learning rate of zero is no test."""
        if id(group) not in self._memo:
            options = {k: self.of_value(v) for k, v in group.items() if k not in ("params", "param_names")}
            lr = options.get("lr")
            if isinstance(lr, torch.Tensor):
                options["lr"] = torch.where((lr.abs() >= 1e-4) & lr.isfinite(), lr, torch.full_like(lr, 1e-2))
            elif isinstance(lr, (int, float)):
                options["lr"] = lr if 1e-4 <= abs(lr) < float("inf") else 1e-2
            if "differentiable" in options:
                options["differentiable"] = False
            self._memo[id(group)] = {"params": [self._made_up], **options}
        return self._memo[id(group)]

    def of_value(self, value: Any) -> Any:
        """A copy of an attribute or an option."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        result: Any = value
        if isinstance(value, torch.Tensor):
            if value.numel() > _LARGEST:
                raise UntestableError(f"it keeps a tensor of {value.numel()} elements outside its state")
            result = value.detach().clone()
        elif isinstance(value, Optimizer):
            return self.of_optimizer(value)
        elif isinstance(value, dict):
            result = copy.copy(value)
            result.clear()
            self._memo[id(value)] = result
            result.update({k: self.of_value(v) for k, v in value.items() if self._stays(k, v)})
        elif type(value) in (list, tuple, set):
            result = type(value)([self.of_value(v) for v in value if id(v) not in self._others])
        elif isinstance(value, types.MethodType):
            result = types.MethodType(value.__func__, self.of_value(value.__self__))
        elif isinstance(value, torch.Generator):
            result = value.clone_state()
        elif not isinstance(value, (nn.Module, types.ModuleType)):
            result = copy.deepcopy(value, self._memo)
        self._memo[id(value)] = result
        return result

    def _stays(self, key: Any, value: Any) -> bool:
        """Whether an entry of a dict belongs to no parameter; the test begins without those that do."""
        return not isinstance(key, torch.Tensor) and id(value) not in self._others
