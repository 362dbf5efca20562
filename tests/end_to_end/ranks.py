"""Work on real processes: all models against the dense ones, and the public functions one after another."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.verification.measure import Float64, relative_error
from autotp.verification.processes import hidden_values
from tests.comparison import backward, outputs, raised, storages
from tests.models import MLP, SmallGPT, TutorialAttention, make
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


def small_gpt(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SmallGPT(hidden=64, vocabulary=301).double()


def api(rank: int, world: int) -> dict[str, Any]:
    """One spawn on two processes for everything that needs them."""
    found: dict[str, Any] = {}
    # Disagreements first: no group exists yet, and each leaves the ranks able to go on.
    found["different tp"] = raised(lambda: autotp.parallelize(small_gpt(), 1 + rank))
    found["different models"] = raised(
        lambda: autotp.parallelize(small_gpt() if rank == 0 else SmallGPT(hidden=32, vocabulary=301).double(), 2)
    )
    inputs = {"ids": torch.zeros(2, 16 if rank == 0 else 8, dtype=torch.long)}
    found["different inputs"] = raised(lambda: autotp.parallelize(small_gpt(), 2, example_inputs=inputs))
    ids = torch.zeros(2, 8, dtype=torch.long)
    keyword = {"ids": ids} if rank == 0 else {"ids": ids, "targets": ids}
    found["different structure"] = raised(lambda: autotp.parallelize(small_gpt(), 2, example_inputs=keyword))

    found["strict"] = raised(lambda: autotp.parallelize(Mixing(), 2, example_inputs=(torch.randn(2, 32),), strict=True))
    found["strict on one"] = raised(lambda: autotp.parallelize(small_gpt(), 2, strict=rank == 0))

    class Broken(SmallGPT):
        def forward(self, ids: torch.Tensor, targets: Any = None) -> Any:
            if rank == 1:
                raise ZeroDivisionError("only here")
            return super().forward(ids, targets)

    Broken.__qualname__ = "SmallGPT"
    found["one rank fails"] = raised(lambda: autotp.parallelize(Broken(hidden=32), 2, example_inputs=(ids,)))
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

    # Modes and dtypes: dropout draws the same on whole values although seeds differ.
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = TutorialAttention(64, 4), MLP(64, 128)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.drop(self.first(x))
            return self.second(self.drop(x))

    torch.manual_seed(0)
    dropping = autotp.parallelize(Dropping().double(), 2)
    x = torch.ones(3, 7, 64, dtype=torch.float64)
    y = dropping(x)
    every = [torch.empty_like(y) for _ in range(2)]
    dist.all_gather(every, y.detach())
    found["dropout agrees"] = torch.equal(every[0], every[1])
    found["dropout drops"] = not torch.equal(y, dropping(x))
    dropping.eval()
    found["eval is steady"] = torch.equal(dropping(x), dropping(x))
    dropping.to(torch.bfloat16)
    low = dropping(x.to(torch.bfloat16))
    found["bfloat16"] = low.dtype is torch.bfloat16
    found["bfloat16 close"] = relative_error(dropping.double()(x), low.double())

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
