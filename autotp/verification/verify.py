"""verify: the dense model against all ranks, value by value and gradient by gradient, in float64."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autotp.arguments.snapshot import restoring_state
from autotp.capture.example_inputs import ExampleInputs, example_call
from autotp.errors import AutoTPError, check_tp
from autotp.modules.model_checks import check_model
from autotp.partition.partition import partition_model
from autotp.plans.make_plan import announce, plan_of
from autotp.verification.measure import Float64, Measured, detached_copy, measure
from autotp.verification.processes import measure_on_processes
from autotp.verification.report import Report, judge
from autotp.verification.rounding import depth, longest_sum, rounding_error
from autotp.verification.simulation import Simulation

__all__ = ["compare", "verify", "with_labels"]


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
                around.enter_context(restoring_state(part.cache.state))
            return measure(it, args, kwargs, lambda: {n: p.grad for n, p in model.named_parameters()}, kept)

    def kept() -> dict[str, torch.Tensor]:
        return {n: x for part in parallel.division.parts for n, x in part.cache.state.kept().items()}

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
            others under what rounding may bring about (:func:`autotp.verification.rounding.rounding_error`).
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
    check_model(model)
    dense = copy.deepcopy(model).eval()
    if dtype is not None:
        dense = dense.to(dtype)
    dtype = next((p.dtype for p in dense.parameters() if p.is_floating_point()), torch.float32)
    args, kwargs = example_call(dense, example_inputs)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: detached_copy(t, dtype) if t.is_floating_point() else t, (args, kwargs)
    )
    mode = Float64() if dtype is torch.float64 else torch.enable_grad()
    with torch.enable_grad(), mode:
        if example_inputs is None:
            kwargs = with_labels(dense, args, kwargs)
        division = partition_model(dense, tp, args, kwargs)
        announce(plan_of(division, tp), division)
        graphs = [p.cache.last.captured.graph for p in division.parts if p.cache.last is not None]
        limit = rounding_error(dtype, depth(graphs), longest_sum(graphs))
        if not processes:
            return compare(dense, Simulation(dense, tp, division, record=True), args, kwargs, limit)
        with contextlib.ExitStack() as around:
            for part in division.parts:
                around.enter_context(restoring_state(part.cache.state))
            expected = measure(
                dense, args, kwargs, lambda: {n: p.grad for n, p in dense.named_parameters()},
                lambda: {n: x.detach() for part in division.parts for n, x in part.cache.state.kept().items()},
            )  # fmt: skip
        dense.zero_grad(set_to_none=True)
        found, diverging = measure_on_processes(dense, tp, args, kwargs)
        return judge(dense, tp, expected, found, limit, math.inf if diverging else 0.0, diverging, division.seams)
