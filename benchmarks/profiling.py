"""Where the time goes, by kind of operation."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from autotp.distributed.shared_memory import SharedMemory
from benchmarks.cases import Work
from benchmarks.models import Competitor
from benchmarks.report import table

KINDS = (
    ("collectives, with waiting", r"collective$|c10d::|c10d_functional|record_param_comms"),
    ("attention", r"scaled_dot_product|flash_attention"),
    ("matrix products", r"aten::(mm|addmm|bmm|baddbmm|mkldnn_linear|_mkl_linear|linear|matmul)$|mkldnn|mkl_"),
    ("softmax and cross entropy", r"softmax|nll|CrossEntropy|logsumexp"),
    ("norms", r"rms_norm|rsqrt|pow|mean$|norm"),
    ("copies, cat, fill", r"copy_|cat$|clone|fill_|zero_|contiguous|constant_pad|index|gather|scatter|to$|_to_copy"),
    ("views", r"view|reshape|transpose|slice|split|chunk|unsqueeze|expand|select|permute|as_strided|^aten::t$|alias|"
              r"detach|narrow|squeeze"),
    ("elementwise", r"aten::(add|mul|sub|div|neg|silu|exp|sum|where|masked|ge|lt|le|bitwise|logical|cos|sin|ne|eq|"
                    r"amax)"),
)  # fmt: skip

Profiles = dict[str, dict[str, Any]]


def profile(work: Work, models: list[Competitor], steps: int = 3) -> Profiles:
    """Milliseconds a step by kind of operation, on rank 0. Profiling itself slows many small operations."""
    places: list[Any] = [dist, SharedMemory]
    names = [(at, n) for at in places for n in ("all_reduce", "all_reduce_", "all_gather") if hasattr(at, n)]
    wrapped: list[tuple[Any, str, Callable[..., Any]]] = [(at, n, getattr(at, n)) for at, n in names]

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function("collective"):
                return function(*args, **kwargs)

        return call

    found: Profiles = {}
    for at, name, function in wrapped:
        setattr(at, name, recorded(function))
    try:
        for model in models:
            dist.barrier()
            if dist.get_rank() == 0:
                found[model.name] = _profile(work, model, steps)
            elif not model.alone:
                for _ in range(steps):
                    work.step(model)
                    work.after(model)
    finally:
        for at, name, function in wrapped:
            setattr(at, name, function)
    dist.barrier()
    return found


def _profile(work: Work, model: Competitor, steps: int) -> dict[str, Any]:
    wall = 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        for _ in range(steps):
            start = time.perf_counter()
            work.step(model)
            wall += time.perf_counter() - start
            work.after(model)
    each = steps * work.case.units
    kinds: dict[str, float] = defaultdict(float)
    ops: dict[str, tuple[float, float]] = {}
    for event in record.key_averages():
        if event.key.startswith(("gloo:", "nccl:")):
            continue  # on the group's own threads
        kind = next((k for k, p in KINDS if re.search(p, event.key)), "other operations")
        kinds[kind] += event.self_cpu_time_total / each / 1e3
        ops[event.key] = (event.count / each, event.self_cpu_time_total / each / 1e3)
    wall *= 1e3 / each
    kinds["Python, between operations"] = wall - sum(kinds.values())
    return {"kinds": dict(kinds), "ops": ops, "count": sum(n for n, _ in ops.values()), "wall": wall}


def show_profile(case: str, found: Profiles) -> list[Any]:
    names = list(found)
    made = table(f"{case}: ms, rank 0, profiled", *names)
    kinds = sorted({k for each in found.values() for k in each["kinds"]},
                   key=lambda k: -max(each["kinds"].get(k, 0) for each in found.values()))  # fmt: skip
    for kind in kinds:
        made.add_row(kind, *(f"{each['kinds'].get(kind, 0.0):.2f}" for each in found.values()))
    made.add_row("in all", *(f"{each['wall']:.2f}" for each in found.values()))
    made.add_row("operations", *(f"{each['count']:.0f}" for each in found.values()))
    if not {"autotp", "hand-written"} <= found.keys():
        return ["", made]
    ops = table("autotp and hand-written differ most in", "times", "ms", "hand-written: times", "ms ", "difference")
    auto, hand = found["autotp"]["ops"], found["hand-written"]["ops"]
    nothing = (0.0, 0.0)
    differing = sorted(auto.keys() | hand.keys(), key=lambda k: -abs(auto.get(k, nothing)[1] - hand.get(k, nothing)[1]))
    for key in differing[:16]:
        (n, a), (m, b) = auto.get(key, nothing), hand.get(key, nothing)
        ops.add_row(key[:48], f"{n:.0f}", f"{a:.3f}", f"{m:.0f}", f"{b:.3f}", f"{a - b:+.3f}")
    return ["", made, "", ops]
