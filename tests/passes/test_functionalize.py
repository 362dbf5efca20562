"""In-place ops: those whose effect nothing else can see become functions, and the others stay right too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autotp.errors import CaptureError
from tests.passes.harness import check, randn
from tests.passes.test_rules import PAIR, Between


def part(y: Tensor) -> Tensor:
    y = y * 1
    y[..., :30].mul_(2)  # y sees it
    return y * 1


def cast(y: Tensor) -> Tensor:
    y = y * 1
    y.to(y.dtype).add_(1)  # a cast to its own type is the tensor itself
    return y * 1


def view_before(y: Tensor) -> Tensor:
    y = y * 1
    view = y.unflatten(-1, (12, -1))
    y.add_(1)
    return view.flatten(-2)


def chained(y: Tensor) -> Tensor:
    y = y * 1
    y.add_(1).mul_(2)
    y += 2
    return y.masked_fill_(y > 3, 0.5)


def promoted(y: Tensor) -> Tensor:
    single = y.to(torch.float32)
    single.add_(torch.ones(60, dtype=torch.float64) / 3)  # stays float32, which an add would not
    return single.to(y.dtype) - y.to(torch.float32).to(y.dtype) + y


@pytest.mark.parametrize("op", [part, cast, view_before, chained, promoted])
def test_in_place_ops(op: Callable[[Tensor], Tensor]) -> None:
    programs = check(Between(op, 60), randn(2, 3, 64))
    assert op is not chained or {n: s.shards[0][0] for n, s in programs[0].stored.items()} == PAIR


def test_changing_an_input_is_said_to_be_impossible() -> None:
    with pytest.raises(CaptureError):
        check(ChangesItsInput(), randn(2, 3, 64).detach())


class ChangesItsInput(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return super().forward(x)
