"""Work on real processes: a parallelized model is changed from outside, or leaves by torch's functional doors."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from autotp.verification.measure import relative_error
from tests.comparison import apart, gradients_apart, raised, scaled

Result = dict[str, Any]


class Doubled(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


def structure(rank: int, world: int) -> Result:
    """Each change on a copy that has been called, and on one that has not."""
    found: Result = {}
    dense, model, x = scaled(world)
    changes: dict[str, Callable[[Any], Any]] = {
        "added module": lambda m: m.add_module("extra", nn.Linear(3, 3)),
        "replaced by a dense one": lambda m: m.second.__setitem__(2, nn.Linear(128, 64).double()),
        "removed": lambda m: m.second.__delitem__(1),
        "parametrized": lambda m: parametrize.register_parametrization(m.second[2], "weight", Doubled()),
        "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.second[2]),
        "old weight norm": lambda m: nn.utils.weight_norm(m.second[2]),
        "data": lambda m: setattr(m.second[2].weight, "data", torch.zeros(64, 128).double()),
        "meta": lambda m: m.to("meta"),
        "meta in part": lambda m: m.second[2].to("meta"),
        "buffer": lambda m: to_buffer(m.second[2]),
    }
    for name, change in changes.items():
        called, uncalled = copy.deepcopy(model), copy.deepcopy(model)
        called(x)
        for m in (called, uncalled):
            change(m)
        found[name] = [raised(functools.partial(m, x)) for m in (called, called, uncalled)]
    model.add_module("extra", nn.Linear(3, 3))
    found["undone"] = raised(lambda: model(x))
    del model.extra
    found["undone: after"] = apart(dense, model, x=x)
    return found


def to_buffer(linear: nn.Module) -> None:
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.register_buffer("weight", weight)


def functional(rank: int, world: int) -> Result:
    found: Result = {}
    dense, model, x = scaled(world)
    pairs = (dense, model)
    doubled = [{n: p.detach() * 2 for n, p in m.named_parameters()} for m in pairs]
    calls = [functional_call(m, p, (x,)) for m, p in zip(pairs, doubled, strict=True)]
    found["functional_call"] = relative_error(*calls)
    found["functional_call, dense"] = raised(lambda: functional_call(model, doubled[0], (x,)))
    found["after functional_call"] = apart(dense, model, x=x)
    found["functional_call matters"] = -relative_error(dense(x), calls[0])

    for reentrant in (True, False):
        for m in pairs:
            m.zero_grad()
            checkpoint(m, x.clone().requires_grad_(), use_reentrant=reentrant).sin().sum().backward()
        found[f"checkpoint {reentrant}"] = gradients_apart(dense, model)
    inputs = [x.clone().requires_grad_() for _ in pairs]
    taken = [torch.autograd.grad(m(i).sin().sum(), [i, m.second[2].bias]) for m, i in zip(pairs, inputs, strict=True)]
    found["autograd.grad"] = max(relative_error(a, b) for a, b in zip(*taken, strict=True))

    averages = [AveragedModel(m) for m in pairs]
    for _ in range(2):
        for m, average in zip(pairs, averages, strict=True):
            with torch.no_grad():
                for p in m.parameters():
                    p.mul_(1.1)
            average.update_parameters(m)
    found["AveragedModel"] = apart(*averages, x=x)
    for m in pairs:
        m.share_memory()
    found["share_memory"] = apart(dense, model, x=x)
    found["copy.copy"] = apart(dense, copy.copy(model), x=x)
    found["wrapped"] = relative_error(nn.Sequential(dense, nn.Tanh())(x), nn.Sequential(model, nn.Tanh())(x))
    found["torch.save"] = raised(lambda: torch.save(model, io.BytesIO()))
    for m in pairs:
        m.to(torch.float32).to(torch.float64)
    found["casts"] = apart(dense, model, x=x)
    return found
