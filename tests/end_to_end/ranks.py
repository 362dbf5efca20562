"""Work on real processes: all models against the dense ones, and the public functions one after another."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import autotp
from autotp.verification.measure import Float64, relative_error
from autotp.verification.processes import hidden_values
from tests.comparison import backward, outputs, raised, storages
from tests.models import SmallGPT, make, small_gpt
from tests.plans.test_plan import Mixing


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


def api(rank: int, world: int) -> dict[str, Any]:
    """One spawn on two processes for everything that needs them."""
    found: dict[str, Any] = {}
    # Errors first: no group exists yet, and each leaves the ranks able to go on.
    found["strict"] = raised(lambda: autotp.parallelize(Mixing(), 2, example_inputs=(torch.randn(2, 32),), strict=True))
    found["too many ranks"] = raised(lambda: autotp.parallelize(small_gpt(), 3))

    # Training: same losses as dense, optimizer made before, tied weights stay tied.
    torch.manual_seed(5)
    ids = torch.randint(0, 301, (4, 12))
    dense, model = small_gpt(), small_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    names = list(model.state_dict())
    autotp.parallelize(model, 2)
    dense_optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        pair = []
        for m, o in ((dense, dense_optimizer), (model, optimizer)):
            o.zero_grad()
            loss, _ = m(ids, targets=ids.roll(-1, 1))
            loss.backward()
            o.step()
            pair.append(float(loss))
        losses.append(pair)
    found["losses"] = losses
    full, state = autotp.full_state_dict(model), dense.state_dict()
    found["trained"] = max(relative_error(state[n], full[n], 1e-3) for n in state)
    found["keys"] = list(model.state_dict()) == names
    found["tied"] = model.head.weight is model.wte.weight
    found["local"] = tuple(model.head.weight.shape)
    found["class"] = type(model) is SmallGPT
    found["twice"] = raised(lambda: autotp.parallelize(model, 2))
    text = str(autotp.graph(model))
    found["graph"] = "column_parallel_linear" in text and "row_parallel_linear" in text and "all_reduce" in text
    found["verify after"] = raised(lambda: autotp.verify(model, 2))

    # Given groups, and tp smaller than the world.
    from torch.distributed.device_mesh import init_device_mesh

    reference = small_gpt()
    for label, options in (("mesh", {"mesh": init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))}),
                           ("group", {"mesh": dist.group.WORLD})):  # fmt: skip
        other = autotp.parallelize(small_gpt(), 2, **options)
        found[label] = relative_error(reference(ids), other(ids))
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    found["two-dimensional mesh"] = raised(lambda: autotp.parallelize(small_gpt(), 2, mesh=two))
    found["part of it"] = relative_error(reference(ids), autotp.parallelize(small_gpt(), 2, mesh=two["tp"])(ids))
    alone = autotp.parallelize(small_gpt(), 1)
    found["tp 1 of 2"] = relative_error(reference(ids), alone(ids))

    # A plan fed back.
    plan = autotp.plan(reference, 2, example_inputs=(ids,))
    followed = autotp.parallelize(small_gpt(), 2, example_inputs=(ids,), plan=autotp.Plan.from_json(plan.to_json()))
    found["plan"] = relative_error(reference(ids), followed(ids))
    found["wrong plan"] = raised(lambda: autotp.parallelize(SmallGPT(hidden=64), 2, plan=plan))
    return found
