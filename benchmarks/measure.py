"""Comparison with the dense model, then times, round by round."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from benchmarks.cases import Work
from benchmarks.models import Competitor, Once, distance, first_failure, reason

TOLERANCE = 1e-4


@dataclass
class Result:
    """One model in one case.

    Attributes:
        seconds: of each round, the slowest rank's; of one token in decoding.
        cpu: processor time of all ranks together, likewise.
        calls: how many collectives, by kind.
        bytes: of their results.
        error: the largest difference from the dense model on any rank: of a loss, logits or a gradient.
        failed: why there is nothing else.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    calls: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    failed: str = ""


def spread(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median, the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(model: Result, reference: Result) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(model.seconds, reference.seconds)]


def largest(value: Any) -> Any:
    """The largest of the ranks' values. Collective."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return max(every)


def check(work: Work, dense: Competitor, models: list[Competitor], once: Once) -> dict[str, Result]:
    """Run each model once beside the dense one: what is different, or fails. Collective."""
    rank = dist.get_rank()
    results = {m.name: Result(failed=m.failed) for m in models}
    work.ready(dense)
    expected = work.step(dense)
    gradients = {n: p.grad for n, p in dense.module.named_parameters() if p.grad is not None}
    work.after(dense)
    for model in models:
        result, error, worst = results[model.name], "", 0.0
        if result.failed:
            continue
        start = time.perf_counter()
        if not model.alone or rank == 0:
            try:
                work.ready(model)
                found = work.step(model)
                seconds = time.perf_counter() - start
                worst = max(distance(a, b) for a, b in zip(expected, found, strict=True))
                if gradients:
                    worst = max(worst, model.gradient_error(gradients))
                work.after(model)
                if model.name.startswith("autotp"):
                    once[f"{model.name}: first call of {work.case.name}"] = seconds
            except Exception as raised:
                error = reason(raised)
        result.failed = first_failure(error)
        if not result.failed:
            result.error = largest(worst)
            if not result.error <= TOLERANCE:
                result.failed = f"not the dense model's numbers: {result.error:.1e}"
    return results


def measure(work: Work, models: list[Competitor], results: dict[str, Result], rounds: int, warmup: int) -> None:
    """Times and collectives of all models that did not fail. Collective."""
    rank, case = dist.get_rank(), work.case
    running = [m for m in models if not results[m.name].failed]
    gc.collect()
    gc.freeze()
    for i in range(warmup + rounds):
        for model in running if i % 2 else running[::-1]:
            dist.barrier()
            gc.disable()
            start, busy = time.perf_counter(), time.process_time()
            mine = not model.alone or rank == 0
            if mine:
                work.step(model)
            spent, worked = time.perf_counter() - start, time.process_time() - busy
            gc.enable()
            if mine:
                work.after(model)
            if i >= warmup:
                results[model.name].seconds.append(spent / case.units)
                results[model.name].cpu.append(worked / case.units)
    gc.unfreeze()
    for model in running:
        result = results[model.name]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (result.seconds, result.cpu))
        result.seconds = [max(each) for each in zip(*(s for s, _ in every))]
        result.cpu = [sum(each) for each in zip(*(c for _, c in every))]
        if not model.alone:
            with model.counting() as count:
                work.step(model)
            work.after(model)
            result.calls = {kind: n / case.units for kind, n in count.calls.items()}
            result.bytes = {kind: n / case.units for kind, n in count.bytes.items()}
