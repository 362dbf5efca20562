"""Work on real processes: torch's functions that fill parameters, each against the dense model filled alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import init
from torch.nn.init import normal_, xavier_uniform_
from torch.nn.utils import parameters_to_vector, prune

from tests.comparison import apart, raised, scaled

Result = dict[str, Any]


def fillers(rank: int, world: int) -> Result:
    found: Result = {}
    dense, model, x = scaled(world)

    def step(name: str, do: Callable[[Any], Any]) -> None:
        before = dense(x=x)
        for m in (dense, model):
            torch.manual_seed(17 if m is dense else 17 + rank)  # rank 0's numbers count
            do(m)
        found[name] = apart(dense, model, x=x), float((dense(x=x) - before).abs().max())

    for name in ("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_",
                 "kaiming_normal_", "orthogonal_", "eye_", "constant_"):  # fmt: skip
        more = (0.3,) if name == "constant_" else ()
        step(name, lambda m, name=name, more=more: getattr(init, name)(m.second[2].weight, *more))
    step("sparse_", lambda m: init.sparse_(m.second[0].weight, sparsity=0.5))
    step("imported before", lambda m: [normal_(m.second[0].weight, 0, 0.2), xavier_uniform_(m.second[2].weight)])
    step("a keyword", lambda m: init.normal_(tensor=m.second[2].weight, std=0.3))
    step("unsplit", lambda m: init.normal_(m.second[2].bias))
    step("reset_parameters", lambda m: [y.reset_parameters() for y in m.modules() if hasattr(y, "reset_parameters")])
    step("apply", lambda m: m.apply(lambda y: kaiming(y.weight) if isinstance(y, nn.Linear) else None))
    step("vector of what there was", lambda m: fill(parameters_to_vector(m.parameters()) * 1.5, m))
    dense_vector = parameters_to_vector(dense.parameters()).detach() / 2
    step("dense vector", lambda m: fill(dense_vector, m))
    found["vector of another length"] = raised(lambda: fill(dense_vector[1:], model))
    found["pruned"] = raised(lambda: prune.l1_unstructured(model.second[2], "weight", 0.3))
    found["pruned globally"] = raised(
        lambda: prune.global_unstructured([(model.second[0], "weight")], prune.L1Unstructured, amount=0.3)
    )
    step("refused", lambda m: None)
    found["one rank"] = raised(lambda: init.normal_(model.second[2].weight) if rank else model(x=x))

    other = nn.Linear(8, 8)
    torch.manual_seed(3)
    init.normal_(other.weight)
    torch.manual_seed(3)
    found["of another model"] = float((other.weight - torch.empty(8, 8).normal_()).abs().max())
    prune.l1_unstructured(other, "weight", 0.5)
    found["another model, pruned"] = float((other.weight == 0).double().mean())
    return found


def kaiming(weight: torch.Tensor) -> torch.Tensor:
    return init.kaiming_uniform_(weight, a=5**0.5)


def fill(vector: torch.Tensor, model: nn.Module) -> None:
    nn.utils.vector_to_parameters(vector, model.parameters())
