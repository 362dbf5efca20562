"""In-place ops: those whose effect nothing else can see become functions, and the others stay right too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autotp.capture.capture import capture
from autotp.errors import CaptureError
from tests.passes.harness import check, randn
from tests.passes.rules.test_rules import PAIR, Between


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


def product(y: Tensor) -> Tensor:
    y = y.unflatten(-1, (6, 10))
    scores = torch.einsum("bshd,bthd->bhst", y, y)
    scores += torch.ones(2, 1, 3, 3, dtype=y.dtype)  # a product's memory is its own
    return torch.einsum("bhst,bthd->bshd", scores, y).flatten(-2)


def chained(y: Tensor) -> Tensor:
    y = y * 1
    y.add_(1).mul_(2)
    y += 2
    return y.masked_fill_(y > 3, 0.5)


def promoted(y: Tensor) -> Tensor:
    single = y.to(torch.float32)
    single.add_(torch.ones(60, dtype=torch.float64) / 3)  # stays float32, which an add would not
    return single.to(y.dtype) - y.to(torch.float32).to(y.dtype) + y


def steps(y: Tensor) -> Tensor:
    """A triangular system solved row by row in place, as gated delta rules are."""
    y = y.unflatten(-1, (6, 10)) * 1
    for i in range(1, 6):
        row, above = y[..., i, :i].clone(), y[..., :i, :i].clone()
        y[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    return y.flatten(-2)


def seen_by_views(y: Tensor) -> Tensor:
    y = y * 1
    before, across, part = y[..., 10:50], y.transpose(0, 1), y.view(2, 3, 6, 10)[:, :, 2:]
    was = before * 1
    across[1, :, 20:] *= 3
    return torch.cat([before + was, part.flatten(-2)], -1)[..., :60]


def written_twice(y: Tensor) -> Tensor:
    y = y * 1
    view = y[0].unsqueeze(0).permute(2, 0, 1)
    view[:7] += 1
    view.mul_(2)
    return y + y[:1]


def broadcast(y: Tensor) -> Tensor:
    y = y * 1
    y[..., ::7] = y[..., :1]
    y[:, 0] = torch.arange(60, dtype=torch.int64, device=y.device)
    return y * 1


def filled(y: Tensor) -> Tensor:
    y = y * 1
    y[0, :, 3:9] = 0.5
    y[1].zero_()
    y[:, 1].fill_(2)
    return y * y


def maybe_a_view(y: Tensor) -> Tensor:
    flat = (y * 1).reshape(2, -1)
    flat[:, :30] *= 2
    return flat.view(2, 3, 60)


def maybe_seen(y: Tensor) -> Tensor:
    y = y * 1
    flat = y.reshape(2, -1)
    flat[:, :30] *= 2  # y sees it or does not: as its strides are
    return y + flat.view(2, 3, 60)


def in_a_region(y: Tensor) -> Tensor:
    with torch.no_grad():
        scale = y.abs().sum((0, 1))
        scale[20:] /= scale[20:].sum()
        scale.clamp_(max=3)
    return y * scale


WAYS = [part, cast, view_before, chained, promoted, steps, seen_by_views, written_twice, broadcast, filled,
        maybe_a_view, maybe_seen, in_a_region, product]  # fmt: skip
AGAIN = {promoted, maybe_seen}
"""Whose views depend on strides or on types, so that torch traces again; the others are made functional as they are."""


@pytest.mark.parametrize("op", WAYS)
def test_in_place_ops(op: Callable[[Tensor], Tensor]) -> None:
    programs = check(Between(op, 60), randn(2, 3, 64))
    assert op is not chained or {n: s.shards[0][0] for n, s in programs[0].weight_layouts.items()} == PAIR


@pytest.mark.parametrize("op", WAYS)
def test_which_need_no_second_trace(op: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(*_: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", traced)
    with pytest.raises(AssertionError, match="traced again") if op in AGAIN else contextlib.nullcontext():
        capture(Between(op, 60), (randn(2, 3, 64),), {})


RETURNED: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": lambda y: y.to(y.dtype),
    "moved": lambda y: y.to(y.device, non_blocking=True),
    "copied": lambda y: y.to(y.dtype, copy=True),
    "contiguous": lambda y: y.contiguous(),
    "dropout": lambda y: torch.dropout(y, 0.5, False),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_region_without_gradients_returns_as_it_was(name: str) -> None:
    """The tensor itself comes back, and for torch.export its later uses are of the region's result."""

    def op(y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = RETURNED[name](y).abs().sum(0)
        return y * scale

    check(Between(op, 60), randn(2, 3, 64), collectives={"all_reduce": 1})


def halved(h: Tensor) -> Tensor:
    with torch.no_grad():
        h.mul_(0.5)
    return h


def clamped_part(h: Tensor) -> Tensor:
    with torch.no_grad():
        h[..., 10:].clamp_(max=0.1)
    return h


@pytest.mark.parametrize("op", [halved, clamped_part])
def test_changes_that_gradients_pass_by_are_refused(op: Callable[[Tensor], Tensor]) -> None:
    """The gradient of ``h`` is what it was before the change; in a functional graph it would be of the change."""
    with pytest.raises(
        CaptureError, match=r"in the model \(test_\w+.py:\d+\) changes a value in place that gradients pass by"
    ):
        capture(Between(op, 60), (randn(2, 3, 64),), {})


def test_changing_an_input_is_said_to_be_impossible() -> None:
    with pytest.raises(CaptureError):
        check(ChangesItsInput(), randn(2, 3, 64).detach())


class ChangesItsInput(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return super().forward(x)
