"""processes: measure a parallelized model on real processes, which are started here and joined again."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.multiprocessing.spawn import ProcessException

from autotp.errors import AutoTPError
from autotp.inspection import full_gradients
from autotp.parallel import parallelize
from autotp.utils.hashing import checksum
from autotp.verification.measure import Float64, Measured, measure
from autotp.verification.simulation import Recorder
from passes.ops.context import use_context

__all__ = ["free_port", "hidden_values", "join_as_rank", "measure_on_processes"]


def free_port() -> int:
    """A port of this machine that no process listens to."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def hidden_values(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The replicated values that this rank's program computes, by node; none of a model captured in parts."""
    runtime = model.__dict__["_autotp"]
    if not hasattr(runtime, "cache"):
        return {}
    call, rank = runtime.cache.bind(args, kwargs), runtime.mesh.rank
    recorder = Recorder(runtime.cache.graph(call.entry.program, rank))
    with use_context(runtime.context), torch.no_grad():
        recorder.run(*call.local(rank))
    return recorder.seen


def _full_module_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a parallelized model keeps between calls, unsharded."""
    runtime = model.__dict__["_autotp"]
    runtimes = [runtime] if hasattr(runtime, "cache") else runtime.parts
    return {n: r.whole(n, x) for r in runtimes for n, x in r.cache.state.tensors().items()}


def join_as_rank(rank: int, tp: int, port: int) -> None:
    """Set this process up as one rank of ``tp``, as torchrun would: one thread, and a seed of its own."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(tp), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)  # ranks must not depend on equal seeds


def _work(
    rank: int, tp: int, port: int, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: str
) -> None:
    """Measure on one rank; the file ``out/rank`` gets checksums of all values, and rank 0's has the values too."""
    join_as_rank(rank, tp, port)
    double = any(p.dtype is torch.float64 for p in model.parameters())
    try:
        with Float64() if double else contextlib.nullcontext(), torch.enable_grad():
            parallelize(model, tp, example_inputs=args or dict(kwargs))
            run = measure(model, args, kwargs, lambda: full_gradients(model), lambda: _full_module_state(model))
            values = {f"hidden value {n}": v for n, v in hidden_values(model, args, kwargs).items()}
            values |= {f"output {n}": v for n, v in run.outputs.items()}
            values |= {f"gradient {n}": v for n, v in run.gradients.items()}
        checksums = {n: (tuple(v.shape), checksum(v)) for n, v in values.items()}
        torch.save((checksums, (run.outputs, run.gradients) if rank == 0 else None), Path(out, str(rank)))
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
        Rank 0's outputs and full gradients, and the name of the first value of which another rank has other bits: a
        replicated hidden value, an output or a gradient. The name is empty if all ranks have the same.

    Raises:
        AutoTPError: the model cannot be sent to another process, or a process failed.
    """
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
    checksums, (outputs, gradients) = results[0]
    mismatches = (n for n, v in checksums.items() if any(others.get(n) != v for others, _ in results[1:]))
    return Measured(outputs, gradients), next(mismatches, "")
