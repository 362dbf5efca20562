"""verify: compare a dense model with its parallel form: outputs, loss and gradients, in float64."""

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
from autotp.partition.partition import Partition, partition_model
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
    """Run a dense model and its simulation on the same inputs, and compare all outputs and gradients.

    Args:
        model: the dense model, whose weights the simulation uses.
        parallel: the simulation of all ranks.
        args: positional inputs.
        kwargs: keyword inputs.
        tolerance: the largest relative error that passes.
    """
    partition = parallel.partition
    dense, simulated = (_measure_in_process(run, model, partition, args, kwargs) for run in (model, parallel))
    graph_breaks = partition.graph_breaks
    return judge(model, parallel.tp, dense, simulated, tolerance, parallel.divergence, parallel.diverging, graph_breaks)


def _measure_in_process(
    run: nn.Module, model: nn.Module, partition: Partition, args: tuple[Any, ...], kwargs: Mapping[str, Any],
    detach_state: bool = False,
) -> Measured:  # fmt: skip
    """Measure a model or its simulation; afterwards the model has no gradients, and its module state is as before.

    Args:
        run: the model or its simulation.
        model: the dense model, whose weights both use.
        partition: the captured model.
        args: positional inputs.
        kwargs: keyword inputs.
        detach_state: whether module state is left out of the backward, as it is on processes.
    """

    def gradients() -> dict[str, torch.Tensor | None]:
        return {n: p.grad for n, p in model.named_parameters()}

    def module_state() -> dict[str, torch.Tensor]:
        state = {n: x for part in partition.parts for n, x in part.cache.state.tensors().items()}
        return {n: x.detach() for n, x in state.items()} if detach_state else state

    model.zero_grad(set_to_none=True)
    with contextlib.ExitStack() as restored:
        for part in partition.parts:
            restored.enter_context(restoring_state(part.cache.state))
        measured = measure(run, args, kwargs, gradients, module_state)
    model.zero_grad(set_to_none=True)
    return measured


def with_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A language model's inputs, with labels for a loss if its forward takes them."""
    ids = kwargs.get("input_ids")
    if (
        "labels" not in inspect.signature(model.forward).parameters
        or "labels" in kwargs
        or not isinstance(ids, torch.Tensor)
    ):
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

    Both run on a copy in eval mode, as dropout draws other numbers by design. The ranks run in lockstep in this
    process, or as ``tp`` real processes. The model stays as it is.

    Args:
        model: the dense model, with real weights.
        tp: the number of ranks.
        example_inputs: as for :func:`autotp.parallelize`. If they are left out, a transformers language model also
            gets labels, so that its loss is compared.
        dtype: the dtype to compare in; None for the model's own. In float64 errors must stay under 1e-10; in
            others under a bound for rounding errors (:func:`autotp.verification.rounding.rounding_error`).
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
        partition = partition_model(dense, tp, args, kwargs)
        announce(plan_of(partition, tp), partition)
        graphs = [p.cache.last.captured.graph for p in partition.parts if p.cache.last is not None]
        limit = rounding_error(dtype, depth(graphs), longest_sum(graphs))
        if not processes:
            return compare(dense, Simulation(dense, tp, partition, record=True), args, kwargs, limit)
        expected = _measure_in_process(dense, dense, partition, args, kwargs, detach_state=True)
        measured, diverging = measure_on_processes(dense, tp, args, kwargs)
        return judge(
            dense, tp, expected, measured, limit, math.inf if diverging else 0.0, diverging, partition.graph_breaks
        )
