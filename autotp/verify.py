"""verify: the dense model against all ranks, value by value and gradient by gradient, in float64."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autotp.admission import admit
from autotp.arguments import Arguments
from autotp.errors import AutoTPError, check_tp
from autotp.inputs import ExampleInputs, example_call
from autotp.keeping import kept_as_it_was
from autotp.parts import Seam, divide
from autotp.planning import announce, plan_of
from autotp.rounding import depth, longest_sum, rounding_error
from autotp.simulate import Simulation

__all__ = ["Float64", "Measured", "Report", "compare", "judge", "measure", "relative_error", "verify", "with_labels"]

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


@dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        model: the model's class.
        tp: the number of ranks.
        outputs: relative error of each output.
        gradients: relative error of the gradient of each parameter, by name, and of each input that
            requires one (``input 0``, in flattened order).
        loss: the dense model's and the parallel loss, where the model computes one.
        norm: the norm of all parameters' gradients, dense and parallel.
        divergence: the largest difference between ranks of a value that is whole on all of them.
        diverging: the first such value.
        tolerance: what errors must stay under.
        dtype: the dtype compared in.
        missing: outputs and gradients that only one side has.
        seams: where capture ended, of a model captured in parts.
    """

    model: str
    tp: int
    outputs: dict[str, float]
    gradients: dict[str, float]
    loss: tuple[float, float] | None
    norm: tuple[float, float]
    divergence: float
    diverging: str
    tolerance: float
    dtype: torch.dtype
    missing: tuple[str, ...] = field(default=())
    seams: tuple[Seam, ...] = field(default=())

    @property
    def worst_output(self) -> float:
        """The largest relative error of an output."""
        return max(self.outputs.values(), default=0.0)

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The gradient with the largest relative error."""
        return max(self.gradients.items(), key=lambda item: item[1], default=("", 0.0))

    @property
    def ok(self) -> bool:
        """Whether outputs and gradients agree within the tolerance and ranks agree to the bit."""
        within = self.worst_output < self.tolerance and self.worst_gradient[1] < self.tolerance
        finite = all(map(math.isfinite, self.norm))
        within = within and (not finite or abs(self.norm[0] - self.norm[1]) <= self.tolerance * self.norm[0])
        return within and self.divergence == 0.0 and not self.missing

    def __str__(self) -> str:
        from autotp.report import report_text

        return report_text(self)


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


def _fresh(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
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
    fresh = [_fresh(x) if isinstance(x, torch.Tensor) else x for x in of.leaves]
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


def judge(
    model: nn.Module, tp: int, dense: Measured, parallel: Measured, tolerance: float, divergence: float,
    diverging: str, seams: Sequence[Seam],
) -> Report:  # fmt: skip
    """The report on two runs.

    A gradient is measured against its own magnitude, or a thousandth of the largest gradient's, whichever is
    larger: some gradients (a key bias's) are zero but for rounding.
    """
    largest = max((float(g.abs().max()) for g in dense.gradients.values()), default=0.0)
    floor, nothing = 1e-3 * largest, torch.empty(0)
    losses = [m.outputs.get("loss") for m in (dense, parallel)]
    return Report(
        model=type(model).__name__,
        tp=tp,
        outputs={n: relative_error(v, parallel.outputs.get(n, nothing)) for n, v in dense.outputs.items()},
        gradients={n: relative_error(g, parallel.gradients.get(n, nothing), floor) for n, g in dense.gradients.items()},
        loss=None if losses[0] is None or losses[1] is None else (float(losses[0]), float(losses[1])),
        norm=(dense.norm, parallel.norm),
        divergence=divergence,
        diverging=diverging,
        tolerance=tolerance,
        dtype=next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
        missing=tuple(
            sorted(
                (dense.outputs.keys() ^ parallel.outputs.keys()) | (dense.gradients.keys() ^ parallel.gradients.keys())
            )
        ),
        seams=tuple(seams),
    )


def compare(
    model: nn.Module, parallel: Simulation, args: tuple[Any, ...], kwargs: Mapping[str, Any], tolerance: float = 1e-10
) -> Report:
    """Run a dense model and its simulation on the same inputs and compare everything.

    Args:
        model: the dense model, whose weights the simulation uses.
        parallel: the simulation of all ranks.
        args: positional inputs.
        kwargs: keyword inputs.
        tolerance: the largest relative error that passes.
    """

    def run(it: nn.Module) -> Measured:
        model.zero_grad(set_to_none=True)
        with contextlib.ExitStack() as around:
            for part in parallel.division.parts:
                around.enter_context(kept_as_it_was(part.programs.memory))
            return measure(it, args, kwargs, lambda: {n: p.grad for n, p in model.named_parameters()}, kept)

    def kept() -> dict[str, torch.Tensor]:
        return {n: x for part in parallel.division.parts for n, x in part.programs.memory.kept().items()}

    dense, found = run(model), run(parallel)
    model.zero_grad(set_to_none=True)
    seams = parallel.division.seams
    return judge(model, parallel.tp, dense, found, tolerance, parallel.divergence, parallel.diverging, seams)


def with_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A language model's inputs with labels to compute a loss from, if it takes them."""
    ids = kwargs.get("input_ids")
    takes = inspect.signature(model.forward).parameters
    if "labels" not in takes or "labels" in kwargs or not isinstance(ids, torch.Tensor):
        return kwargs
    labelled = {**kwargs, "labels": ids.clone()}
    try:
        with torch.no_grad():
            model(*args, **labelled)
    except Exception:  # labels of another kind: classes, spans
        return kwargs
    return labelled


def verify(
    model: nn.Module, tp: int, *, example_inputs: ExampleInputs = None, dtype: torch.dtype | None = torch.float64,
    processes: bool = False,
) -> Report:  # fmt: skip
    """Compare the dense model with all ranks of its parallel form: outputs, loss, every gradient.

    Runs on a copy, in eval mode (dropout draws different numbers by design), all ranks in lockstep in
    this process, or on ``tp`` processes of their own. The model is left as it was.

    Args:
        model: the dense model, with real weights.
        tp: the number of ranks.
        example_inputs: as for :func:`autotp.parallelize`. Left out for a transformers language model,
            labels are added so that its loss is compared too.
        dtype: the dtype to compare in; None for the model's own. In float64 errors must stay under 1e-10; in
            others under what rounding may bring about (:func:`autotp.rounding.rounding_error`).
        processes: whether to start real processes, which communicate through gloo.

    Raises:
        AutoTPError: the model cannot be compared, or a process failed.

    Example:
        >>> assert autotp.verify(model, tp=4).ok
    """
    check_tp(tp)
    meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise AutoTPError(f"{meta} is on the meta device: verify compares numbers, so the model needs weights")
    if "_autotp" in model.__dict__:
        raise AutoTPError("verify takes the dense model, before autotp.parallelize")
    admit(model)
    dense = copy.deepcopy(model).eval()
    if dtype is not None:
        dense = dense.to(dtype)
    dtype = next((p.dtype for p in dense.parameters() if p.is_floating_point()), torch.float32)
    args, kwargs = example_call(dense, example_inputs)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: _fresh(t, dtype) if t.is_floating_point() else t, (args, kwargs)
    )
    mode = Float64() if dtype is torch.float64 else torch.enable_grad()
    with torch.enable_grad(), mode:
        if example_inputs is None:
            kwargs = with_labels(dense, args, kwargs)
        division = divide(dense, tp, args, kwargs)
        announce(plan_of(division, tp), division)
        graphs = [p.programs.last.captured.graph for p in division.parts if p.programs.last is not None]
        limit = rounding_error(dtype, depth(graphs), longest_sum(graphs))
        if not processes:
            return compare(dense, Simulation(dense, tp, division, record=True), args, kwargs, limit)
        from autotp.spawned import measure_spawned

        with contextlib.ExitStack() as around:
            for part in division.parts:
                around.enter_context(kept_as_it_was(part.programs.memory))
            expected = measure(
                dense, args, kwargs, lambda: {n: p.grad for n, p in dense.named_parameters()},
                lambda: {n: x.detach() for part in division.parts for n, x in part.programs.memory.kept().items()},
            )  # fmt: skip
        dense.zero_grad(set_to_none=True)
        found, diverging = measure_spawned(dense, tp, args, kwargs)
        return judge(dense, tp, expected, found, limit, math.inf if diverging else 0.0, diverging, division.seams)
