"""Real gloo processes for tests: one spawn for many cases."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from autotp.verification.processes import free_port, join_as_rank

Ran = list[dict[str, Any]]
"""Each rank's result."""


def _worker(rank: int, world: int, port: int, work: Callable[..., Any], args: tuple[Any, ...], out: str) -> None:
    join_as_rank(rank, world, port)
    try:
        result = work(rank, world, *args)
    except Exception:
        result = {"error": traceback.format_exc()}
    Path(out, str(rank)).write_bytes(pickle.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def run(world: int, work: Callable[..., Any], *args: Any, out: Path) -> list[Any]:
    """``work(rank, world, *args)`` on real processes; each rank's result."""
    out.mkdir(parents=True, exist_ok=True)
    mp.spawn(_worker, (world, free_port(), work, args, str(out)), nprocs=world)
    return [pickle.loads(Path(out, str(rank)).read_bytes()) for rank in range(world)]


def results_of(world: int, work: Callable[..., Any], factory: Any, *args: Any) -> Ran:
    """Each rank's result of some work, none of which may have failed."""
    results = run(world, work, *args, out=factory.mktemp(work.__name__))
    for rank, result in enumerate(results):
        assert "error" not in result, f"rank {rank}:\n{result.get('error')}"
    return results
