"""Work on real processes: calls that differ between ranks, and models that are changed after parallelize."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import autotp
from tests.comparison import apart, gradients_apart, raised, scaled
from tests.models import Scaled

Result = dict[str, Any]


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

    # In place, dtypes, modes, frozen parameters; all of parameters that a state dict was assigned to.
    model.load_state_dict(dense.state_dict(), assign=True)
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
