"""Work on real processes: optimizers that are tried out before their first step on shards, and norms of parameters."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import autotp
from autotp.verification.measure import relative_error
from autotp.weights import optimizer_state
from tests.comparison import raised
from tests.weights import optimizers
from tests.weights.optimizers import ELEMENTWISE, READERS, Make

Result = dict[str, Any]
NEED_CLOSURES = {"LBFGS", "Sharpness"}


class Perceptron(nn.Module):
    """Two matrices, one of them cut by rows and the other by columns, unevenly on two ranks and on three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(64, 257), nn.Linear(257, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


X = torch.linspace(-1, 1, 8 * 64, dtype=torch.float64).view(8, 64).sin()
Pair = tuple[nn.Module, nn.Module]


def _train(model: nn.Module, make: Make, steps: int = 3) -> None:
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - X).square().mean().backward()
        optimizer.step()


def _trained_apart(pair: Pair, make: Make) -> float:
    """How far training takes a parallel model from the dense one."""
    for m in pair:
        m.load_state_dict(Perceptron().double().state_dict())
        _train(m, make)
    state, full = pair[0].state_dict(), autotp.full_state_dict(pair[1])
    return max(relative_error(state[n], full[n], 1e-3) for n in state)


def _matrices(make: Make) -> Make:
    return lambda parameters: make([p for p in parameters if p.dim() == 2])


def tried_out(rank: int, world: int) -> Result:
    found: Result = {}
    model = autotp.parallelize(Perceptron().double(), world, example_inputs=(X,))
    pair = Perceptron().double(), model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", autotp.UntestedOptimizerWarning)
        for name, make in ELEMENTWISE.items():
            found[name] = _trained_apart(pair, make)
        group = [dist.new_group([r]) for r in range(world)][rank]
        found["ZeroRedundancyOptimizer"] = _trained_apart(
            pair, lambda p: ZeroRedundancyOptimizer(p, torch.optim.Adam, process_group=group, lr=1e-2)
        )
    found["warnings"] = [str(w.message) for w in caught if w.category is autotp.UntestedOptimizerWarning]
    for name, make in READERS.items():
        if name not in NEED_CLOSURES:
            found[name] = raised(lambda: _trained_apart(pair, _matrices(make)))  # noqa: B023
    with mock.patch.object(optimizer_state, "moves_parts_otherwise", return_value=None):
        for name in ("Lamb", "transformers' Adafactor", "Clipping small ones"):
            found[f"{name}: let through"] = _trained_apart(pair, _matrices(READERS[name]))

    found["shapes"] = [tuple(p.shape) for p in model.parameters()]
    model(X).sum().backward()
    unsplit = [p for n, p in model.named_parameters() if n == "down.bias"]
    found["of unsplit ones"] = raised(lambda: optimizers.Lamb(unsplit).step())
    rows = [p for n, p in model.named_parameters() if n == "up.weight"]
    found["by rows, of rows"] = raised(lambda: optimizers.ByRows(rows).step())
    found["by rows, of columns"] = raised(lambda: optimizers.ByRows([model.down.weight]).step())
    found["of biases"] = raised(lambda: torch.optim.Adafactor([model.up.bias]).step())
    found["not parallelized"] = raised(lambda: _train(Perceptron().double(), optimizers.Lamb))
    found |= _again(model)
    found |= _untestable(model)
    return found


def _again(model: nn.Module) -> Result:
    """When an optimizer is tried out: at its first step, and when options change in kind."""
    found: Result = {}
    optimizer = optimizers.Lamb(model.parameters(), trust=False, beta=0.5)
    tried = mock.Mock(side_effect=optimizer_state.moves_parts_otherwise)
    with mock.patch.object(optimizer_state, "moves_parts_otherwise", tried):
        counts = []
        for change in ({}, {}, {"lr": 0.5}, {"beta": 0.7}, {"beta": 0}, {"beta": 0.1}):
            optimizer.param_groups[0].update(change)
            optimizer.step()
            counts.append(tried.call_count)
        found["times"] = counts
        optimizer.param_groups[0]["trust"] = True
        found["changed options"] = raised(optimizer.step)
        found["and once more"] = raised(optimizer.step)
    adam = torch.optim.Adam([model.up.weight])
    adam.step()
    adam.add_param_group({"params": [model.down.weight], "amsgrad": True})
    found["another group"] = raised(adam.step)
    return found


def _untestable(model: nn.Module) -> Result:
    found: Result = {}
    small = nn.Linear(16, 31).double()  # dense optimizers do not care
    for name, make in {
        "picky": lambda p: optimizers.Picky(p, 1),
        "collective": optimizers.Gossip,
        "picky muon": lambda p: optimizers.PickyMuon(p, 1),
    }.items():
        optimizer = make([p for p in model.parameters() if p.dim() == 2])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            errors = [raised(optimizer.step) for _ in range(2)]
        named = [w for w in caught if w.category is autotp.UntestedOptimizerWarning]
        found[name] = errors, [str(w.message) for w in named]
    found["dense"] = raised(lambda: optimizers.Picky(small.parameters(), 1).step())
    return found
