"""inspection: the graph, the full state dict and the full gradients of a parallelized model."""

from __future__ import annotations

import torch
from torch import nn

from autotp.errors import AutoTPError
from autotp.partition.partitioned_runtime import PartitionedRuntime
from autotp.program.rank_graph import RankGraph
from autotp.runtime.graph_runtime import GraphRuntime, runtime_of
from autotp.utils.hashing import stable_hash

__all__ = ["full_gradients", "full_state_dict", "graph"]


def graph(model: nn.Module) -> RankGraph:
    """The rewritten ``fx.GraphModule`` of this rank that the model ran, or was prepared for, last.

    Its text begins with how many graphs the model has by now, how often it was captured, and the inputs that this graph
    is for. Calls that differ only in the sizes of batch and sequence share one graph.

    Args:
        model: a parallelized model; of one that was captured in parts, the module that is a part; or a submodule
            that was called by itself.

    Raises:
        AutoTPError: the model is not parallelized, or runs as several graphs, which it lists, or has not run.

    Example:
        >>> print(autotp.graph(model))
    """
    runtime = runtime_of(model)
    if isinstance(runtime, PartitionedRuntime):
        paths = ", ".join(f"model.{p.cache.path}" for p in runtime.parts)
        raise AutoTPError(f"this {type(model).__name__} runs as a graph for each of its parts: pass one of {paths}")
    assert isinstance(runtime, GraphRuntime)
    if runtime.cache.last is None:
        raise AutoTPError(
            f"this {type(model).__name__} ({runtime.cache.path}) has not been called by itself, and has no graph of "
            "its own: pass the model that was parallelized"
        )
    rank_graph = runtime.cache.graph(runtime.cache.last, runtime.mesh.rank)
    rank_graph.note = f"; {runtime.cache.describe(runtime.cache.last)}"
    return rank_graph


def full_state_dict(
    model: nn.Module, *, rank: int | None = None, device: torch.device | str | None = None
) -> dict[str, torch.Tensor]:
    """The dense model's state dict: full tensors. Collective: all ranks must call it.

    One tensor after another is gathered. A rank that does not keep them has no more than one in memory.

    Args:
        model: a parallelized model.
        rank: the tensor-parallel rank that gets the state dict, where the others get an empty one; None: all get it.
        device: the device to move each full tensor to, such as ``"cpu"``; None: it stays on the parameters' device.

    Raises:
        AutoTPError: the model is not parallelized.
        MismatchError: the ranks ask for different things.
        ValueError: there is no such rank.

    Example:
        >>> state = autotp.full_state_dict(model, rank=0, device="cpu")
        >>> if dist.get_rank() == 0:
        ...     torch.save(state, "dense.pt")
    """
    runtime = runtime_of(model)
    if rank is not None and not 0 <= rank < runtime.mesh.tp:
        raise ValueError(f"rank={rank}: this model has the ranks 0 to {runtime.mesh.tp - 1}")
    local = model.state_dict()
    split = {f"shards of {name}": str(bool(runtime.shards_of(name, t))) for name, t in local.items()}
    split |= {"rank": str(rank)}
    runtime.agreement.check("full_state_dict", stable_hash(str(split)), lambda: split)
    full = {}
    for name, tensor in local.items():
        dense = runtime.whole(name, tensor)
        if rank in (None, runtime.mesh.rank):
            full[name] = dense if device is None else dense.to(device)
    return full


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The dense model's gradients by parameter name, full tensors, on every rank; None where there is
    none. Collective: all ranks must call it."""
    runtime = runtime_of(model)
    there = {f"gradient of {n}": "None" if p.grad is None else "a tensor" for n, p in model.named_parameters()}
    runtime.agreement.check("full_gradients", stable_hash(str(there)), lambda: there)
    return {n: None if p.grad is None else runtime.whole(n, p.grad) for n, p in model.named_parameters()}
