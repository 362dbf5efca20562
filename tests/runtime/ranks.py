"""Work on real processes for what lies outside the graph: norms, agreement, loading, changes, optimizers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import autotp
from autotp.verification.measure import relative_error
from passes import ops
from passes.ops import context
from tests.comparison import apart, backward, gradients_apart, outputs, raised, same, scaled
from tests.models import IDS, Grouped, Scaled, SmallGPT

Result = dict[str, Any]


def _pairs(world: int) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Dense and parallel models, with gradients: key-value heads replicated, overlapping, and a tied head."""
    for name, make_one in {
        "replicated": lambda: Grouped(1).double(),
        "overlapping": lambda: Grouped(3).double(),
        "tied": lambda: SmallGPT(layers=1).double(),
    }.items():
        torch.manual_seed(0)
        dense = make_one()
        model = autotp.parallelize(copy.deepcopy(dense), world, example_inputs=(IDS,))
        for m in (dense, model):
            backward(outputs(m(IDS)))
        yield name, dense, model


def norms(rank: int, world: int) -> Result:
    found: Result = {}
    local_norm = torch.nn.utils.clip_grad._get_total_norm.__closure__  # torch's own, before any parallelize
    assert local_norm is not None
    torchs = local_norm[0].cell_contents
    pairs = list(_pairs(world))
    for name, dense, model in pairs:
        errors, equal = {}, True
        for power in (1.0, 2.0, 3.5, float("inf"), -1.0, "inf"):
            for foreach in (None, True, False):
                expected = torchs([p.grad for p in dense.parameters()], power, False, foreach)
                total = get_total_norm([p.grad for p in model.parameters()], power, foreach=foreach)
                errors[power, foreach] = relative_error(expected, total)
                equal &= same(total)
        found[f"{name}: errors"], found[f"{name}: same bits"] = errors, equal
        found[f"{name}: dtype"] = total.dtype
        shares = torchs([p.grad for p in model.parameters()], 2.0)
        found[f"{name}: counting shards only"] = relative_error(errors_of(dense, torchs), shares)
        detached = get_total_norm([p.grad.detach() for p in model.parameters()])
        found[f"{name}: detached"] = relative_error(errors_of(dense, torchs), detached)
        half = get_total_norm([p.grad for n, p in model.named_parameters() if "norm" in n or "k" in n])
        expected = torchs([p.grad for n, p in dense.named_parameters() if "norm" in n or "k" in n])
        found[f"{name}: some"] = relative_error(expected, half)
        found[f"{name}: zero"] = raised(lambda m=model: get_total_norm([p.grad for p in m.parameters()], 0.0))

    _, dense, model = pairs[0]
    other_dense, other = pairs[1][1:]
    torch.manual_seed(7)
    extra = [nn.Linear(5, 5).double() for _ in range(2)]
    for e in extra:
        e.load_state_dict(extra[0].state_dict())
        e(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    many = [*model.parameters(), *extra[0].parameters(), *other.parameters()]
    expected = torchs([p.grad for p in (*dense.parameters(), *extra[1].parameters(), *other_dense.parameters())])
    found["two models and another"] = relative_error(expected, get_total_norm([p.grad for p in many]))

    total = clip_grad_norm_(model.parameters(), 0.5)
    expected = clip_grad_norm_(dense.parameters(), 0.5)
    found["clipped"] = relative_error(expected, total), gradients_apart(dense, model)
    found["clipped to"] = float(get_total_norm([p.grad for p in model.parameters()]))
    for m in (dense, model):
        clip_grads_with_norm_(m.parameters(), 0.1, expected)
        clip_grad_value_(m.parameters(), 1e-3)
    found["values"] = gradients_apart(dense, model)
    found["different max_norm"] = raised(lambda: clip_grad_norm_(model.parameters(), 1.0 + (rank == 1)))
    weight = model.head.weight
    if rank == 1:
        weight.grad[0] = float("nan")
    found["not finite"] = raised(lambda: clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True))
    if rank == 1:
        weight.grad = None
    found["no gradient on rank 1"] = raised(lambda: clip_grad_norm_(model.parameters(), 1.0))
    model.zero_grad()
    found["no gradients"] = float(clip_grad_norm_(model.parameters(), 1.0))
    plain = nn.Linear(3, 3)
    plain(torch.ones(1, 3)).sum().backward()
    found["other models"] = torch.equal(
        clip_grad_norm_(plain.parameters(), 100.0 + rank), torchs([p.grad for p in plain.parameters()])
    )
    return found


def errors_of(dense: nn.Module, torchs: Callable[..., torch.Tensor]) -> torch.Tensor:
    return torchs([p.grad for p in dense.parameters()], 2.0)


def agreement(rank: int, world: int) -> Result:
    found: Result = {}
    odd = rank == world - 1
    dense, model, x = scaled(world)
    found["as before"] = apart(dense, model, x=x)
    cases: dict[str, Callable[[], Any]] = {
        "shape": lambda: model(x[: 2 if odd else 3]),
        "dtype": lambda: model(x.float() if odd else x),
        "structure": lambda: model(x, flag=True) if odd else model(x=x, flag=True),
        "constant": lambda: model(x, flag=odd),
        "input that needs a gradient": lambda: model(x.clone().requires_grad_(odd)),
    }
    for name, call in cases.items():
        found[name] = raised(call)
        found[f"{name}: after"] = apart(dense, model, x=x)

    def changed(name: str, there: Callable[[], Any], back: Callable[[], Any]) -> None:
        handle = there() if odd else None
        found[name] = raised(lambda: model(x))
        if odd:
            back() if handle is None or not hasattr(handle, "remove") else handle.remove()
        found[f"{name}: after"] = apart(dense, model, x=x)

    changed("mode", model.train, model.eval)
    changed("mode of a submodule", model.drop.train, model.drop.eval)
    changed("gradients disabled", lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True))
    weight = model.second[0].weight
    changed("frozen", lambda: weight.requires_grad_(False), lambda: weight.requires_grad_(True))
    changed("hook", lambda: model.drop.register_forward_hook(lambda *a: None), lambda: None)
    changed("attribute", lambda: setattr(model, "scale", 9.0), lambda: setattr(model, "scale", 1.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    if odd:
        optimizer.step()
    found["optimizer"] = raised(lambda: model(x))
    if not odd:
        optimizer.step()
    found["optimizer: after"] = apart(dense, model, x=x)
    optimizer.found_inf = torch.zeros(1)
    found["scaler"] = raised(optimizer.step)
    found["other step"] = raised(lambda: autotp.full_state_dict(model) if odd else model(x))
    wrong = {"down": x[..., :7]} if odd else {}
    found["argument"] = raised(lambda: model(x, **wrong))
    found["argument: after"] = apart(dense, model, x=x)

    dense, careful, x = scaled(world, debug=True)
    found["debug"] = apart(dense, careful, x=x)
    found["debug: values"] = raised(lambda: careful(x + odd))
    if odd:
        with torch.no_grad():
            careful.second[2].bias.add_(1)
    found["debug: weights"] = raised(lambda: careful(x))

    # Last, for these break process groups: each has its own.
    for name in ("fewer calls", "no backward"):
        group = dist.new_group(timeout=timedelta(seconds=4))
        model, x = scaled(world, mesh=group, timeout=timedelta(seconds=4))[1:]
        y = model(x)
        dist.barrier()
        if name == "fewer calls":
            found[name] = "stayed away" if odd else raised(lambda: model(x))  # noqa: B023
        else:
            x.requires_grad_()
            y = model(x)
            found[name] = raised(lambda: model(x)) if odd else raised(lambda: y.sum().backward())  # noqa: B023
        dist.monitored_barrier(timeout=timedelta(seconds=30))
    return found


def changes(rank: int, world: int) -> Result:
    """One parallelized model, changed in one way after another; each against a dense one changed alike."""
    found: Result = {}
    dense, model, x = scaled(world)
    other = Scaled().double().eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.25)

    early = Scaled().double().eval()
    kept = early(x)  # and with it the nodes that remember the shapes of weights
    autotp.parallelize(early, world, example_inputs=(x,))
    early(x).square().sum().backward()
    dense(x).square().sum().backward()
    found["an output of before"] = gradients_apart(dense, early) if kept.requires_grad else 1.0
    dense.zero_grad(set_to_none=True)

    # State dicts: dense, local, wrong, partial, assigned, and as a part of something bigger.
    state = other.state_dict()
    model.load_state_dict(state)
    found["dense state"] = apart(other, model, x=x)
    local = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(dense.state_dict())
    found["and back"] = apart(dense, model, x=x)
    model.load_state_dict(local)
    found["local state"] = apart(other, model, x=x)
    wrong = {**state, "second.0.weight": torch.zeros(77, 64)}
    found["wrong state"] = raised(lambda: model.load_state_dict(wrong))
    found["untouched"] = apart(other, model, x=x)
    part = {n: t for n, t in dense.state_dict().items() if n.startswith("first")}
    dense.load_state_dict({**state, **part})
    found["missing keys"] = raised(lambda: model.load_state_dict(part))
    model.load_state_dict(part, strict=False)
    found["partial state"] = apart(dense, model, x=x)
    outer = nn.ModuleDict({"inner": model})
    outer.load_state_dict({f"inner.{n}": t for n, t in state.items()})
    found["prefixed state"] = apart(other, model, x=x)
    model.load_state_dict(dense.state_dict(), assign=True)
    found["assigned state"] = apart(dense, model, x=x)
    found["assigned shapes"] = [tuple(p.shape) for p in model.second.parameters()]
    full = autotp.full_state_dict(model)
    found["full state"] = all(torch.equal(full[n], t) for n, t in dense.state_dict().items())

    # In place, dtypes, modes, frozen parameters.
    for m in (dense, model):
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(0.5).add_(0.01)
    found["in place"] = apart(dense, model, x=x)
    for m in (dense, model):
        m.float()
    found["float"] = apart(dense, model, x=x.float())
    for m in (dense, model):
        m.double()
    for frozen in (True, False):
        for m in (dense, model):
            m.first.requires_grad_(not frozen)
            m.zero_grad()
            m(x).sin().sum().backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        found[f"frozen {frozen}"] = (
            gradients_apart(dense, model),
            missing == [n for n, p in dense.named_parameters() if p.grad is None],
        )
    captures = model.__dict__["_autotp"].cache.captures.count
    for m in (dense, model):
        m.scale = -0.5
    found["attribute"] = apart(dense, model, x=x), model.__dict__["_autotp"].cache.captures.count - captures
    for m in (dense, model):
        m.scale = 1.5
        m.shift = m.shift.flip(0).clone()
    found["buffer on the model"] = apart(dense, model, x=x)

    # Replaced parameters and modules, hooks.
    weight = model.second[0].weight
    model.second[0].weight = nn.Parameter(weight.detach() * 2)
    dense.second[0].weight = nn.Parameter(dense.second[0].weight.detach() * 2)
    found["replaced parameter"] = apart(dense, model, x=x)
    for m in (dense, model):
        linear = m.second[0]
        linear._parameters = {**linear._parameters, "weight": nn.Parameter(linear.weight.detach() * 0.5)}
    found["replaced dict"] = apart(dense, model, x=x)
    model.second[0].weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.float64))
    found["replaced by a dense one"] = raised(lambda: model(x)), raised(lambda: model(x))
    kept, linear = model.second[0]._parameters, model.second[0]
    linear._parameters = {**kept, "weight": nn.Parameter(torch.zeros(128, 64, dtype=torch.float64))}
    found["a dict with a dense one"] = raised(lambda: model(x))
    linear._parameters = kept
    model.second[0].weight = weight
    model.second[1], gelu = nn.ReLU(), model.second[1]
    found["replaced module"] = raised(lambda: model(x))
    model.second[1] = gelu
    model.second[1].forward = torch.relu
    found["replaced forward"] = raised(lambda: model(x))
    del model.second[1].forward
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(model.first, f"register_{kind}")(lambda *args: None)
        found[kind] = raised(lambda: model(x))
        handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    found["global hook"] = raised(lambda: model(x))
    handle.remove()
    model.extra = nn.Parameter(torch.zeros(3))
    found["new parameter"] = raised(lambda: model(x))
    del model.extra
    found["an object"] = raised(lambda: model(x, flag=object()))
    model.load_state_dict(dense.state_dict())
    found["healed"] = apart(dense, model, x=x)
    seen: list[Any] = []
    for m in (dense, model):
        m.zero_grad()
        m.register_forward_hook(lambda module, args, output: output * 3)
        m.register_full_backward_hook(lambda module, given, taken: seen.append(taken[0].sum().item()))
        m(x).sin().sum().backward()
    found["hooks of the model itself"] = gradients_apart(dense, model), abs(seen[0] - seen[1]) < 1e-9

    # Copies.
    dense, model, x = scaled(world)
    ema = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    found["copy"] = apart(dense, ema, x=x), apart(dense, ema, x=x[:1])
    ema(x).sum().backward()
    dense(x).sum().backward()
    found["gradients of a copy"] = gradients_apart(dense, ema), all(p.grad is None for p in model.parameters())
    ema.load_state_dict(other.state_dict())
    found["state of a copy"] = apart(other, ema, x=x)
    found["part of a copy"] = raised(lambda: copy.deepcopy(model.second))
    found["pickle"] = raised(lambda: pickle.dumps(model))
    return found


def training(rank: int, world: int) -> Result:
    """Optimizers, and 20 steps with dropout, from a different seed on each rank."""
    found: Result = {}
    for name, make_optimizer in {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, 1e-2, foreach=False),
        "foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
        "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    }.items():
        pairs = []
        for _ in range(2):
            m = Scaled().double().eval()
            pairs.append((m, make_optimizer(m.parameters())))
        x = torch.linspace(-1, 1, 3 * 5 * 64, dtype=torch.float64).view(3, 5, 64).sin()

        def step(m: nn.Module, optimizer: Any, x: torch.Tensor = x) -> None:
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()

        for m, optimizer in pairs:
            step(m, optimizer)  # dense, both of them: the optimizers have state
        (dense, _), (model, _) = pairs
        autotp.parallelize(model, world, example_inputs=(x,))
        for m, optimizer in pairs * 3:
            step(m, optimizer)
        full, state = autotp.full_state_dict(model), dense.state_dict()
        found[name] = max(relative_error(state[n], full[n], 1e-3) for n in state)
        pairs[1][1].load_state_dict(copy.deepcopy(pairs[0][1].state_dict()))  # a dense checkpoint
        for m, optimizer in pairs:
            step(m, optimizer)
        full, state = autotp.full_state_dict(model), dense.state_dict()
        found[f"{name}: loaded"] = max(relative_error(state[n], full[n], 1e-3) for n in state)
    for kind in ("Adafactor", "Muon", "LBFGS"):
        if hasattr(torch.optim, kind):
            matrices = [p for p in model.parameters() if p.dim() == 2]
            optimizer = getattr(torch.optim, kind)(matrices)
            found[kind] = raised(lambda: optimizer.step(lambda: model(x).sum()))  # noqa: B023

    torch.manual_seed(100 + rank)
    model = Scaled().double()
    with torch.inference_mode():
        autotp.parallelize(model, world, example_inputs=(x,))
        model(x.clone(), flag=True)
    model(x, flag=True).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    runtime, whole, drops = model.__dict__["_autotp"], [], []
    for i in range(20):
        found["dropping"] = model.training
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1 * (i + 1))
        optimizer.step()
        whole.append(same(y))
        drops.append(float(y.detach().sum()))
    found["outputs agree"] = all(whole) and len(set(drops)) == 20
    found["whole parameters agree"] = all(same(p.data) for _, p, shards in runtime.placed() if not shards)
    found["shards differ"] = not same(model.second[0].weight.data)
    with context.use_context(runtime.context):
        own = ops.random_per_rank(torch.nn.functional.dropout, torch.ones(1000), 0.5)
        shared = ops.random_same(torch.nn.functional.dropout, torch.ones(1000), 0.5)
    found["own"], found["shared"] = same(own), same(shared)
    return found


def replicas(rank: int, world: int) -> Result:
    """Models one after another of which two of three ranks hold one head: a group that the third is not in."""
    result: Result = {}
    for number in range(3):
        dense, model = Grouped(2).double(), Grouped(2).double()
        autotp.parallelize(model, world, example_inputs=(IDS,), timeout=timedelta(seconds=30))
        result[f"{number}: outputs"] = apart(dense, model, ids=IDS)
        backward(outputs(dense(IDS)))
        backward(outputs(model(IDS)))
        result[f"{number}: gradients"] = gradients_apart(dense, model)
        result[f"{number}: groups"] = sorted(g.size for g in model.__dict__["_autotp"].fabric._groups.values())
    return result
