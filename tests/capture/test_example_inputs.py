"""Inputs that capture guesses, or is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autotp
from tests.models import make


class TestGuessedInputs:
    """Without example inputs and dummy inputs, what the first layers suggest is tried."""

    @pytest.mark.parametrize("name", ["tutorial", "encoder", "gpt"])
    def test_guesses(self, name: str) -> None:
        model, _ = make(name)
        assert autotp.plan(model, 2).share_split > 0.9

    def test_nothing_runs(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> torch.Tensor:
                return self.linear(x) + more["y"]

        with pytest.raises(autotp.CaptureError, match="pass example_inputs"):
            autotp.plan(Odd(), 2)

    def test_of_the_wrong_type(self) -> None:
        with pytest.raises(autotp.CaptureError, match=r"tuple \(positional\) or a dict"):
            autotp.plan(make("gpt")[0], 2, example_inputs=3)  # type: ignore[arg-type]
