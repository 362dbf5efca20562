"""measure: run a model once, forward and backward, and keep its outputs and gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from autotp.arguments.arguments import Arguments

__all__ = ["Float64", "Measured", "measure", "relative_error"]

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class Float64(TorchFunctionMode):
    """A mode in which explicit casts to narrower floats give float64, and float64 is the default dtype.

    Models cast norms, softmax and losses to float32 by name. In a float64 comparison such a cast would round
    at 1e-7 and hide smaller errors. With this mode around both runs, no cast rounds.
    """

    def __enter__(self) -> Float64:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function with float64 in place of narrower dtypes."""
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in _NARROW else a for a in args)
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def relative_error(expected: torch.Tensor, actual: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference divided by the largest expected magnitude, or by ``floor`` if that is larger.

    Infinite if the shapes differ, or if other elements are finite.
    """
    if expected.shape != actual.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    a, b = expected.detach().double(), actual.detach().double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a.nan_to_num(posinf=0, neginf=0), b.nan_to_num(posinf=0, neginf=0)
    scale = max(float(a.abs().max()), floor)
    difference = float((a - b).abs().max())
    return difference / scale if scale else difference


def _outputs(result: Any) -> dict[str, torch.Tensor]:
    """The tensors of a call's result, by path."""
    arguments = Arguments((result,), {})
    leaves = zip(arguments.spec.paths(), arguments.leaves, strict=True)
    named = ((re.sub(r"\W+", ".", n.removeprefix("args[0]")).strip(".") or "output", x) for n, x in leaves)
    return {n: x for n, x in named if isinstance(x, torch.Tensor)}


def _mutated_inputs(args: Any, kwargs: Any, inputs: list[Any], values: list[Any]) -> dict[str, torch.Tensor]:
    """The tensors of a call's arguments that the call put there or wrote to, by path.

    Args:
        args: the positional arguments after the call.
        kwargs: the keyword arguments after the call.
        inputs: the leaves that the call was given.
        values: the values that those had before the call.
    """
    arguments, before = Arguments(args, kwargs), {id(x): value for x, value in zip(inputs, values, strict=True)}
    leaves = zip(arguments.spec.paths(), arguments.leaves, strict=True)
    tensors = ((n, x) for n, x in leaves if isinstance(x, torch.Tensor))
    return {n: x for n, x in tensors if id(x) not in before or not torch.equal(x, before[id(x)])}


def _backward(outputs: Mapping[str, torch.Tensor], seed: int = 0) -> None:
    """Run a backward from all outputs at once, with fixed random output gradients."""
    generator = torch.Generator().manual_seed(seed)
    roots, gradients = [], []
    for value in outputs.values():
        gradient = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.requires_grad:
            roots.append(value)
            gradients.append(gradient.to(value.device, value.dtype))
    torch.autograd.backward(roots, gradients)


def detached_copy(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy of a tensor as a leaf of autograd, in a dtype, that requires a gradient if the tensor does."""
    return x.detach().to(dtype or x.dtype, copy=True).requires_grad_(x.requires_grad)


@dataclass(frozen=True)
class Measured:
    """The results of one run of a model.

    Attributes:
        outputs: its outputs, by their paths in the result.
        gradients: the gradients of parameters, by name, and of each input that requires one.
    """

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]

    @property
    def norm(self) -> float:
        """The norm of all parameters' gradients together, as ``clip_grad_norm_`` computes it."""
        return math.sqrt(sum(float(g.double().square().sum()) for n, g in self.gradients.items() if n[:6] != "input "))


def measure(
    run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any],
    gradients: Callable[[], Mapping[str, torch.Tensor | None]],
    module_state: Callable[[], Mapping[str, torch.Tensor]] = dict,
) -> Measured:  # fmt: skip
    """Run a model forward, then backward from all outputs at once with fixed random output gradients.

    Args:
        run: the model.
        args: positional inputs.
        kwargs: keyword inputs.
        gradients: returns the full gradients of the parameters, by name, after the backward.
        module_state: returns the unsharded tensors that the model keeps between calls.
    """
    arguments = Arguments(args, kwargs)
    inputs = [detached_copy(x) if isinstance(x, torch.Tensor) else x for x in arguments.leaves]
    own_args, own_kwargs = arguments.spec.unflatten(inputs)
    state_before = {n: (x, x._version) for n, x in module_state().items()}
    result = run(*own_args, **own_kwargs)
    outputs = _outputs(result) | _mutated_inputs(own_args, own_kwargs, inputs, arguments.leaves)
    for n, x in module_state().items():  # clones: it may be restored afterwards; in the backward if this call wrote it
        before, version = state_before.get(n, (None, -1))
        outputs[f"state.{n}"] = x.detach().clone() if x is before and x._version == version else x.clone()
    _backward(outputs)
    measured = {n: g for n, g in gradients().items() if g is not None and g.numel()}
    named = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)}
    measured |= {n: x.grad for n, x in named.items() if x.is_leaf and x.grad is not None}
    return Measured({n: v.detach() for n, v in outputs.items()}, measured)
