"""Work on real processes for models that run as parts: numbers, random streams, and what users do around a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import autotp
from autotp.program.rank_graph import RankGraph
from autotp.verification.measure import relative_error
from tests.comparison import apart, gradients_apart, raised
from tests.models import MLP, Block

Result = dict[str, Any]


class Dropping(nn.Module):
    """Dropout between parts and in them, activation checkpointing, a tied head, a branch on values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"embed": nn.Embedding(101, 64), "head": nn.Linear(64, 101, bias=False)})
        self.net["head"].weight = self.net["embed"].weight
        self.drop = nn.Dropout(0.5)
        self.blocks = nn.ModuleList(nn.Sequential(b, nn.Dropout(0.5)) for b in (Block(64, 4), MLP(64, 128)))
        self.reentrant: bool | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.net["embed"](ids))
        x = x * 2 if (x > 0).any() else x
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.net["head"](x)


def divided(rank: int, world: int) -> dict[str, Any]:
    """Dense against parts on real processes, then training steps with dropout and checkpointing."""
    torch.manual_seed(0)
    model, ids = Dropping().double().eval(), torch.randint(0, 101, (2, 8))
    dense = Dropping().double().eval()
    dense.load_state_dict(model.state_dict())
    plan = autotp.plan(model, world, example_inputs=(ids,))
    autotp.parallelize(model, world, example_inputs=(ids,))
    expected = dense(ids)
    with autotp.Tally() as forward:
        found = model(ids)
    with autotp.Tally() as back:
        found.square().sum().backward()
    expected.square().sum().backward()
    gradients, mesh = autotp.full_gradients(model), model.__dict__["_autotp"].mesh
    errors = {n: relative_error(p.grad, gradients[n]) for n, p in dense.named_parameters() if p.grad is not None}
    state = autotp.full_state_dict(model)
    result: dict[str, Any] = {
        "output": relative_error(expected, found),
        "gradients": errors,
        "counts": (sum(forward.calls.values()), sum(back.calls.values())),
        "planned": (plan.count("forward"), plan.count("backward")),
        "held": (sum(p.numel() for p in model.parameters()), plan.parameters(rank)),
        "state": all(torch.equal(state[n], t) for n, t in dense.state_dict().items()),
        "graph": isinstance(autotp.graph(model.blocks[0]), RankGraph),
    }
    try:
        autotp.graph(model)
    except autotp.AutoTPError as error:
        result["whole"] = str(error)
    x = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result["inside"] = relative_error(dense.blocks[1][0][0](x), model.blocks[1][0][0](x))
    model.train()
    torch.manual_seed(100 + rank)  # ranks must not depend on equal seeds
    runtime = model.__dict__["_autotp"]
    start = (runtime.region.stream._streams.copy(), runtime.context._streams.copy())
    steps = {}
    for model.reentrant in (None, False, True):
        runtime.region.stream._streams.clear()
        runtime.region.stream._streams.update(start[0])
        model.zero_grad()
        outputs = model(ids)
        outputs.square().sum().backward()
        own = {n: g for n, g in autotp.full_gradients(model).items() if g is not None}
        whole = {n: p.grad for n, p in model.named_parameters() if n in own and p.shape == own[n].shape}
        every = mesh.gathered((outputs, whole))
        same = all(torch.equal(outputs, o) for o, _ in every)
        same &= all(torch.equal(g, every[0][1][n]) for _, gs in every for n, g in gs.items())
        steps[model.reentrant] = (same, outputs.detach(), own)
    result["same"] = [same for same, _, _ in steps.values()]
    result["dropped"] = not torch.equal(steps[None][1], expected)
    result["checkpointed"] = [
        max(relative_error(g, steps[how][2][n]) for n, g in steps[None][2].items()) for how in (False, True)
    ]
    return result


class Unseen(list[str]):
    """A list of a class of its own, which the ranks do not compare."""


class Trouble(nn.Module):
    """Two parts and Python between them that can do what a test asks of it, on this rank."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.norm = MLP(64, 128), MLP(64, 128), nn.LayerNorm(64)
        self.scale, self.calls = 1.5, 0
        self.asked = Unseen()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.first(x) * self.scale
        x = x + 1 if (x > 0).any() else x
        if "raise" in self.asked:
            raise ValueError("in the middle")
        if "cut" in self.asked:
            x = x[:1]
        if "add" in self.asked:
            x = x + 1
        if "read" in self.asked:
            x = x + self.second[0].weight.sum()
        x = self.norm(x)
        x = x if "skip" in self.asked else self.second(x)
        if "raise at the end" in self.asked:
            raise ValueError("at the end")
        return x * 2 if "double" in self.asked else x


def trouble(rank: int, world: int, **options: Any) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    x = torch.randn(3, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = autotp.parallelize(Trouble(rank).double(), world, example_inputs=(x,), **options)
    dense = Trouble().double()
    dense.load_state_dict(autotp.full_state_dict(model))
    return dense, model, x


def around(rank: int, world: int) -> Result:
    """What users do around a model with parts: ranks that differ, loading, norms, changes, copies, optimizers."""
    dense, model, x = trouble(rank, world)
    odd = rank == world - 1
    found: Result = {"weights of rank 0": all(torch.equal(t, dense.state_dict()[n]) for n, t in Trouble(0).double(
    ).state_dict().items())}  # fmt: skip

    def asked(name: str, *what: str, on: bool = odd, call: Callable[[], Any] = lambda: model(x)) -> None:
        model.asked[:] = what if on else ()
        found[name] = raised(call)
        model.asked.clear()
        found[f"{name}: after"] = apart(dense, model, x=x)

    found["as before"] = apart(dense, model, x=x)
    for name in ("raise", "raise at the end", "skip", "cut"):
        asked(name, name)
    asked("all raise", "raise", on=True)
    asked("all read", "read", on=True)
    asked("shape", call=lambda: model(x[: 2 if odd else 3]))
    model.scale = 9.0 if odd else 1.5
    found["attribute"] = raised(lambda: model(x))
    model.scale = 1.5
    model.first[1].train(not odd)
    found["mode"] = raised(lambda: model(x))
    model.first[1].train()
    found["a part by itself"] = relative_error(dense.first(x), model.first(x))
    found["inside a part"] = relative_error(dense.first[0](x), model.first[0](x))

    # Hooks, modules, parameters.
    seen: list[Any] = []
    for m in (dense, model):
        for module in (m.norm, m.second):
            module.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    found["hooks around parts"] = apart(dense, model, x=x), len(seen)
    handle = model.second[1].register_forward_hook(lambda *args: None)
    found["hook in a part"] = raised(lambda: model(x))
    handle.remove()
    model.second, part = MLP(64, 128).double(), model.second
    found["replaced part"] = raised(lambda: model(x))
    model.second = part
    weight = model.second[0].weight
    model.second[0].weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.float64))
    found["replaced by a dense one"] = raised(lambda: model(x))
    model.second[0].weight = weight
    found["healed"] = apart(dense, model, x=x)

    # State, gradients, copies.
    other = Trouble(7).double().state_dict()
    for m in (dense, model):
        m.load_state_dict(copy.deepcopy(other), assign=m is model)
    found["dense state"] = apart(dense, model, x=x)
    found["full state"] = all(torch.equal(autotp.full_state_dict(model)[n], t) for n, t in other.items())
    asked("all read what was assigned", "read", on=True)
    twin = copy.deepcopy(model)
    for m in (dense, model):
        m.zero_grad()
        m(x).sin().sum().backward()
    found["gradients"] = gradients_apart(dense, model)
    norm = [clip_grad_norm_(m.parameters(), 0.5) for m in (dense, model)]
    found["norm"] = relative_error(*norm), gradients_apart(dense, model)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (dense, model)]
    found["copy before a step"] = apart(dense, twin, x=x)
    for optimizer in optimizers:
        optimizer.step()
    found["step"] = apart(dense, model, x=x)
    still = torch.optim.SGD(model.parameters(), 0.0)
    if odd:
        still.step()
    found["optimizer"] = raised(lambda: model(x))
    if not odd:
        still.step()
    found["optimizer: after"] = apart(dense, model, x=x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    dense.load_state_dict(other)
    dense.zero_grad()
    for m in (dense, twin):
        m(x).sin().sum().backward()
    found["copy"] = apart(dense, twin, x=x), gradients_apart(dense, twin)
    found["copied graphs"] = twin.first.__dict__["_autotp"].owner is twin.__dict__["_autotp"]
    found["part of a copy"] = raised(lambda: copy.deepcopy(model.first))
    found["pickle"] = raised(lambda: pickle.dumps(model))

    dense, model, x = trouble(rank, world, debug=True)
    found["debug"] = apart(dense, model, x=x)
    for name in ("add", "double"):
        asked(name, name)
    return found
