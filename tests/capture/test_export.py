"""A model that torch.export refuses gives an error that says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autotp


def test_control_flow_on_values_is_an_error_that_says_so() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if x.sum() > 0 else x

    # the linear layer is not called: else it would be a part
    with pytest.raises(autotp.CaptureError, match="depends on the values in a tensor"):
        autotp.plan(Branches(), 2, example_inputs=(-torch.ones(2, 3, 8),))
