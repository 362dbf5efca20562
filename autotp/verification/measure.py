"""measure: one run of a model in float64: outputs and gradients."""

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

    Models upcast norms, softmax and losses to float32 by name. In a float64 comparison that would round
    at 1e-7 and hide errors below; with this mode around both sides nothing is rounded.
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
        """Replace narrow dtypes among the arguments."""
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in _NARROW else a for a in args)
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def relative_error(expected: torch.Tensor, found: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest expected magnitude (at least ``floor``); inf if shapes or
    the places of non-finite values differ."""
    if expected.shape != found.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    a, b = expected.detach().double(), found.detach().double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a.nan_to_num(posinf=0, neginf=0), b.nan_to_num(posinf=0, neginf=0)
    scale = max(float(a.abs().max()), floor)
    difference = float((a - b).abs().max())
    return difference / scale if scale else difference


def _outputs(result: Any) -> dict[str, torch.Tensor]:
    of = Arguments((result,), {})
    named = zip(of.spec.paths(), of.leaves, strict=True)
    names = ((re.sub(r"\W+", ".", n.removeprefix("args[0]")).strip(".") or "output", x) for n, x in named)
    return {n: x for n, x in names if isinstance(x, torch.Tensor)}


def _left(args: Any, kwargs: Any, given: list[Any], before: list[Any]) -> dict[str, torch.Tensor]:
    """What a call has left in its arguments, by place: tensors that were not there, or had other values ``before``."""
    of, known = Arguments(args, kwargs), {id(x): was for x, was in zip(given, before, strict=True)}
    held = ((n, x) for n, x in zip(of.spec.paths(), of.leaves, strict=True) if isinstance(x, torch.Tensor))
    return {n: x for n, x in held if id(x) not in known or not torch.equal(x, known[id(x)])}


def _backward(outputs: Mapping[str, torch.Tensor], seed: int = 0) -> None:
    """Start a backward from every output at once, with fixed random weights."""
    generator = torch.Generator().manual_seed(seed)
    roots, weights = [], []
    for value in outputs.values():
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.requires_grad:
            roots.append(value)
            weights.append(weight.to(value.device, value.dtype))
    torch.autograd.backward(roots, weights)


def detached_copy(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.detach().to(dtype or x.dtype, copy=True).requires_grad_(x.requires_grad)


@dataclass(frozen=True)
class Measured:
    """What one run of a model gave.

    Attributes:
        outputs: its outputs, by their places in the result.
        gradients: by parameter name, and of each input that requires one.
    """

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]

    @property
    def norm(self) -> float:
        """The norm of all parameters' gradients together, as ``clip_grad_norm_`` takes it."""
        return math.sqrt(sum(float(g.double().square().sum()) for n, g in self.gradients.items() if n[:6] != "input "))


def measure(
    run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any],
    gradients: Callable[[], Mapping[str, torch.Tensor | None]],
    kept: Callable[[], Mapping[str, torch.Tensor]] = dict,
) -> Measured:  # fmt: skip
    """Run a model forward, and backward from every output at once with fixed random weights.

    Args:
        run: the model.
        args: positional inputs.
        kwargs: keyword inputs.
        gradients: gives the dense model's gradients by name afterwards.
        kept: gives what the model keeps from one call to the next after the forward, whole.
    """
    of = Arguments(args, kwargs)
    fresh = [detached_copy(x) if isinstance(x, torch.Tensor) else x for x in of.leaves]
    own_args, own_kwargs = of.spec.close(fresh)
    kept_before = {n: (x, x._version) for n, x in kept().items()}
    result = run(*own_args, **own_kwargs)
    outputs = _outputs(result) | _left(own_args, own_kwargs, fresh, of.leaves)
    for n, x in kept().items():  # clones, for it may be made what it was; with gradients where it is of this call
        was, version = kept_before.get(n, (None, -1))
        outputs[f"state.{n}"] = x.detach().clone() if x is was and x._version == version else x.clone()
    _backward(outputs)
    found = {n: g for n, g in gradients().items() if g is not None and g.numel()}
    inputs = {f"input {i}": x for i, x in enumerate(fresh) if isinstance(x, torch.Tensor)}
    found |= {n: x.grad for n, x in inputs.items() if x.is_leaf and x.grad is not None}
    return Measured({n: v.detach() for n, v in outputs.items()}, found)
