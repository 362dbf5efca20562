"""Work done on real gloo processes: one spawn for many cases."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils import _pytree as pytree

import autotp
from autotp.verification.measure import Float64, relative_error
from autotp.verification.processes import free_port, hidden_values, join_as_rank
from tests.models import make


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


def outputs(result: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def storages(model: Any) -> list[Any]:
    return [p.untyped_storage() for p in model.parameters()]


def backward(values: list[torch.Tensor]) -> None:
    """A backward from every output with fixed weights."""
    roots = [v for v in values if v.requires_grad]
    weights = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view(v.shape).cos() for v in roots]
    torch.autograd.backward(roots, weights)


def correctness(rank: int, world: int, names: list[str]) -> dict[str, Any]:
    """Dense against parallel on real processes: outputs, hidden values, gradients, state, counts."""
    results: dict[str, Any] = {}
    for name in names:
        with Float64():
            dense, kwargs = make(name)
            model, _ = make(name)
            if rank:  # other ranks start from other weights
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1.5)
            before = [id(p) for p in model.parameters()]
            returned = autotp.parallelize(model, world, example_inputs=kwargs)
            assert returned is model
            assert before == [id(p) for p in model.parameters()]
            errors, gradients = {}, {}
            for batch, length in ((2, 16), (1, 7), (3, 20)):
                _, own = make(name, batch, length, seed=batch)
                dense.zero_grad(set_to_none=True)
                model.zero_grad(set_to_none=True)
                expected = outputs(dense(**own))
                with autotp.Tally() as forward:
                    found = outputs(model(**own))
                with autotp.Tally() as back:
                    backward(found)
                backward(expected)
                errors[batch, length] = [relative_error(a, b) for a, b in zip(expected, found, strict=True)]
                grads = autotp.full_gradients(model)
                largest = max(float(p.grad.abs().max()) for p in dense.parameters() if p.grad is not None)
                for n, p in dense.named_parameters():
                    if p.grad is not None:
                        error = (
                            relative_error(p.grad, grads[n], 1e-6 * largest) if grads[n] is not None else float("inf")
                        )
                        gradients[n] = max(gradients.get(n, 0.0), error)
                if batch == 2:
                    counts = (dict(forward.calls), dict(forward.elements), dict(back.calls), dict(back.elements))
            hidden = hidden_values(model, (), kwargs)
            checks = {k: v.double().sum().item() for k, v in hidden.items()}
            gathered = model.__dict__["_autotp"].mesh.gathered(hidden)
            apart = [k for k in hidden if not all(torch.equal(hidden[k], other[k]) for other in gathered)]
            full = autotp.full_state_dict(model)
            state = dense.state_dict()
            plan = autotp.plan(dense, world, example_inputs=kwargs)
            results[name] = {
                "outputs": errors,
                "gradients": gradients,
                "apart": apart,
                "hidden": len(checks),
                "state": list(full) == list(state) and all(torch.equal(full[k], state[k]) for k in state),
                "held": sum(p.numel() for p in model.parameters()),
                "stored": sum({s.data_ptr(): s.nbytes() for s in storages(model)}.values()) // 8,
                "planned": plan.parameters(rank),
                "counts": counts,
                "planned_counts": (plan.count("forward"), plan.count("backward")),
                "type": type(model).__name__ == type(dense).__name__,
            }
    if world == 4:  # fewer tensor-parallel ranks than processes: consecutive ones form groups
        dense, kwargs = make("gpt")
        model = autotp.parallelize(make("gpt")[0], 2, shared_memory=False)
        results["groups"] = relative_error(dense(**kwargs)[1], model(**kwargs)[1]), model.wte.weight.shape[0]
    return results
