"""spawned: a model's parallel form on real processes, started here and joined again, for comparison."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.multiprocessing.spawn import ProcessException

from autotp.errors import AutoTPError
from autotp.utils.hashing import checksum
from autotp.verification.simulation import Recorder
from passes.ops.context import use_context

if TYPE_CHECKING:
    from autotp.verification.measure import Measured

__all__ = ["free_port", "hidden_values", "join_as_rank", "measure_on_processes"]


def free_port() -> int:
    """A port on this machine that nothing listens to."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def hidden_values(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Every value of this rank's program that should be whole; nothing of a model in parts."""
    runtime = model.__dict__["_autotp"]
    if not hasattr(runtime, "cache"):
        return {}
    call, rank = runtime.cache.bind(args, kwargs), runtime.mesh.rank
    recorder = Recorder(runtime.cache.graph(call.entry.program, rank))
    with use_context(runtime.context), torch.no_grad():
        recorder.run(*call.local(rank))
    return recorder.seen


def _kept(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a parallelized model keeps from one call to the next, whole."""
    runtime = model.__dict__["_autotp"]
    of = [runtime] if hasattr(runtime, "cache") else runtime.parts
    return {n: each.whole(n, x) for each in of for n, x in each.cache.state.kept().items()}


def join_as_rank(rank: int, tp: int, port: int) -> None:
    """Make this process one of ``tp``, as torchrun would: one thread, and a seed of its own."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(tp), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)  # ranks must not depend on equal seeds


def _work(
    rank: int, tp: int, port: int, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: str
) -> None:
    import autotp
    from autotp.verification.measure import Float64, measure

    join_as_rank(rank, tp, port)
    double = any(p.dtype is torch.float64 for p in model.parameters())
    try:
        with Float64() if double else contextlib.nullcontext(), torch.enable_grad():
            autotp.parallelize(model, tp, example_inputs=args or dict(kwargs))
            found = measure(model, args, kwargs, lambda: autotp.full_gradients(model), lambda: _kept(model))
            whole = {f"hidden value {n}": v for n, v in hidden_values(model, args, kwargs).items()}
            whole |= {f"output {n}": v for n, v in found.outputs.items()}
            whole |= {f"gradient {n}": v for n, v in found.gradients.items()}
        sums = {n: (tuple(v.shape), checksum(v)) for n, v in whole.items()}
        torch.save((sums, (found.outputs, found.gradients) if rank == 0 else None), Path(out, str(rank)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def measure_on_processes(
    model: nn.Module, tp: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Measured, str]:
    """Run the parallel form of a dense model once, forward and backward, on ``tp`` processes of this machine.

    Args:
        model: the dense model, in eval mode.
        tp: the number of processes.
        args: positional inputs.
        kwargs: keyword inputs.

    Returns:
        What rank 0 measured, with full gradients, and the first value in which another rank differs from it by a
        bit: a hidden value that is whole, an output, a gradient. Empty if there is none.

    Raises:
        AutoTPError: the model cannot be sent to another process, or a process failed.
    """
    from autotp.verification.measure import Measured

    with tempfile.TemporaryDirectory() as out:
        try:
            mp.spawn(_work, (tp, free_port(), model, args, dict(kwargs), out), nprocs=tp)
        except ProcessException as error:
            *_, last = [line for line in str(error).splitlines() if line.strip()] or [""]
            raise AutoTPError(f"a process failed: {last}") from error
        except (AttributeError, TypeError, ImportError) as error:  # pickle's ways to say no
            raise AutoTPError(
                f"a {type(model).__name__} cannot be sent to other processes: {error}; define its class in a module "
                "that can be imported, or verify it in this process"
            ) from error
        results = [torch.load(Path(out, str(rank)), weights_only=True) for rank in range(tp)]
    sums, (outputs, gradients) = results[0]
    differ = (n for n, v in sums.items() if any(each.get(n) != v for each, _ in results[1:]))
    return Measured(outputs, gradients), next(differ, "")
