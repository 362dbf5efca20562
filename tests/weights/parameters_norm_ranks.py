"""Work on real processes: norms of all parameters, in the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import autotp
from autotp.verification.measure import relative_error
from tests.comparison import gradients_apart, outputs, raised, same
from tests.models import IDS, Grouped, SmallGPT

Result = dict[str, Any]
POWERS = (0.5, 1, 1.5, 2.0, 3.5, float("inf"), "inf")
TENSORS = Callable[[nn.Module], Any]


def _pairs(world: int) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Dense and parallel models: key-value heads replicated and overlapping, a tied head, a frozen weight, zeros."""
    for name, make in {
        "replicated": lambda: Grouped(1),
        "overlapping": lambda: Grouped(3),
        "heads for two ranks": lambda: Grouped(2),
        "tied": lambda: SmallGPT(layers=1),
    }.items():
        torch.manual_seed(0)
        dense = make().double()
        next(dense.parameters()).requires_grad_(name != "overlapping")
        with torch.no_grad():
            next(p for p in dense.parameters() if p.dim() == 1)[:3] = 0
        yield name, dense, autotp.parallelize(copy.deepcopy(dense), world, example_inputs=(IDS,))


def _flat(model: nn.Module, power: Any) -> torch.Tensor:
    """The norm as torch computes it of all elements, by another way than nested norms."""
    return torch.linalg.vector_norm(torch.cat([p.flatten() for p in model.parameters()]), float(power))


def _by_hand(model: nn.Module, power: Any) -> torch.Tensor:
    return torch.stack([p.norm(float(power)) for p in model.parameters()]).norm(float(power))


def _penalized(model: nn.Module, norm: Callable[[nn.Module, Any], torch.Tensor], power: Any) -> torch.Tensor:
    """Gradients of a loss with a penalty that dominates it; the penalty."""
    model.zero_grad()
    penalty = norm(model, power)
    (outputs(model(IDS))[0].square().mean() * 1e-3 + 3 * penalty).backward()
    return penalty.detach()


def parameters_norms(rank: int, world: int) -> Result:
    found: Result = {}
    pairs = list(_pairs(world))
    for name, dense, model in pairs:
        norms, gradients, equal = {}, {}, True
        for power in POWERS:
            expected, norm = _penalized(dense, _flat, power), _penalized(model, autotp.parameters_norm, power)
            norms[power] = relative_error(expected, norm)
            gradients[power] = gradients_apart(dense, model)
            equal &= same(norm)
        found[f"{name}: norms"], found[f"{name}: gradients"], found[f"{name}: same bits"] = norms, gradients, equal
        held = [p.shape == q.shape for p, q in zip(dense.parameters(), model.parameters())]
        found[f"{name}: splits"] = not all(held)
        expected, shares = _penalized(dense, _flat, 2.0), _penalized(model, _by_hand, 2.0)
        found[f"{name}: by hand"] = relative_error(expected, shares), gradients_apart(dense, model)

    (_, dense, model), (_, other_dense, other), *_ = pairs
    found["some"] = _some(dense, model)
    extra = nn.Linear(5, 5).double()
    with torch.no_grad():
        extra.weight.fill_(0.25)
        extra.bias.fill_(0.5)
    many = [*model.parameters(), *extra.parameters(), *other.parameters(), *model.parameters()]
    every = [*dense.parameters(), *extra.parameters(), *other_dense.parameters()]
    expected = torch.linalg.vector_norm(torch.cat([p.flatten() for p in every]))
    norm = autotp.parameters_norm(many)
    found["two models and another"] = relative_error(expected, norm)
    found["gradient of another"] = relative_error(extra.bias / expected, torch.autograd.grad(norm, extra.bias)[0])
    found["wrong"] = _wrong(rank, model)
    found["then"] = relative_error(_flat(dense, 2), autotp.parameters_norm(model))
    found["half"] = _half(dense, world)
    return found


def _some(dense: nn.Module, model: nn.Module) -> list[float]:
    """One shard; a part of the model; some parameters; what has no shard; no parameter."""
    choices: list[TENSORS] = [
        lambda m: m.head.weight,
        lambda m: m.q,
        lambda m: [p for n, p in m.named_parameters() if "norm" in n or "k" in n],
        lambda m: m.norm.parameters(),
    ]
    found = []
    for choose in choices:
        given = choose(dense)
        given = list(given.parameters()) if isinstance(given, nn.Module) else given
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        expected = torch.linalg.vector_norm(torch.cat([p.flatten() for p in given]))
        found.append(relative_error(expected, autotp.parameters_norm(choose(model))))
    return [*found, float(autotp.parameters_norm([]))]


def _wrong(rank: int, model: nn.Module) -> dict[str, str]:
    def again() -> None:
        (weight,) = [p for p in model.parameters() if p is model.head.weight]
        first = torch.autograd.grad(autotp.parameters_norm(model), weight, create_graph=True)[0]
        first.sum().backward()

    given = [model.head.weight, model.out.weight][: 1 + (rank > 0)]
    return {
        "another power": raised(lambda: autotp.parameters_norm(model, 2.0 + rank)),
        "other parameters": raised(lambda: autotp.parameters_norm(given)),
        "zero": raised(lambda: autotp.parameters_norm(model, 0)),
        "negative": raised(lambda: autotp.parameters_norm(model, float("-inf"))),
        "second derivative": raised(again),
    }


def _half(dense: nn.Module, world: int) -> dict[str, Any]:
    """Parameters in bfloat16: computed in float32, then rounded once."""
    dense = copy.deepcopy(dense).bfloat16()
    model = autotp.parallelize(copy.deepcopy(dense), world, example_inputs=(IDS,))
    norm = autotp.parameters_norm(model)
    norm.backward()
    exact = _flat(copy.deepcopy(dense).double(), 2.0).detach()
    whole = autotp.full_gradients(model)["head.weight"]
    error = float((whole.double() - dense.head.weight.detach().double() / exact).abs().max() * exact)
    return {"norm": torch.equal(norm, exact.bfloat16()), "dtype": whole.dtype, "gradient": error}
