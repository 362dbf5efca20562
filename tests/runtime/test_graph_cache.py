"""The graphs of a model: one for each set of constants and attributes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import autotp
from autotp.verification.measure import relative_error
from tests.modules.test_model_checks import X, mlp


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor, scale: float = 1.0, sizes: Any = ()) -> torch.Tensor:
        y = self.inner(x)
        return y * (2.0 if math.isnan(scale) else scale) + sum(sizes)


def test_constants_of_any_kind_have_their_program_once() -> None:
    model = Arguments()
    parallel = autotp.simulate(model, 2, example_inputs=(X,))
    for options in ({"scale": math.nan}, {"scale": 0.5}, {"sizes": [1, 2]}, {"scale": 1}):
        for _ in range(2):
            assert relative_error(model(X, **options), parallel(X, **options)) < 1e-5
    assert parallel.cache.captures.count == 5
    with pytest.raises(autotp.CaptureError, match=r"a builtins\.set, whose content autotp cannot see"):
        parallel(X, sizes={1, 2})


def test_attributes_that_change_make_another_graph() -> None:
    model = Arguments()
    parallel = autotp.simulate(model, 2, example_inputs=(X,))
    model.inner[1].approximate = "tanh"
    assert relative_error(model(X), parallel(X)) < 1e-6
    model.inner[1].approximate = "none"
    assert relative_error(model(X), parallel(X)) < 1e-6
    assert parallel.cache.captures.count == 2, "the first graph holds again"
