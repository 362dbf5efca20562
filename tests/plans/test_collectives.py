"""The number of collectives, and their bytes, per transformer block."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import autotp
from autotp.modules.names import block_of
from autotp.verification.measure import Float64
from tests.models import make

BLOCKS = {
    "encoder": (2, 0),
    "gpt": (2, 1),
    "gpt2": (2, 1),
    "llama": (2, 1),
    "neox": (1, 1),
    "bloom": (2, 1),
    "bert": (2, 1),
}
"""The least reductions per block and direction (one where attention and MLP run side by side), and
those outside of blocks: the embedding's forward; the head's or the pooler's backward."""


@pytest.mark.parametrize(("name", "least", "outside"), [(n, *counts) for n, counts in BLOCKS.items()])
def test_reductions_per_block(name: str, least: int, outside: int) -> None:
    model, kwargs = make(name)
    for value in kwargs.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_(True)  # else the first block owes its input no gradient
    with Float64():
        plan = autotp.plan(model, 2, example_inputs=kwargs)
    hidden = 60 if name == "encoder" else 48 if name in ("gpt2", "bert") else 64
    layers = 2
    for when in ("forward", "backward"):
        reductions = [c for c in plan.collectives if c.when == when and c.kind == "all_reduce"]
        assert len(reductions) == least * layers + outside, (when, reductions)
        for c in reductions:
            assert c.itemsize == 8
            vectors = 0 if when == "forward" else 8 * hidden  # gradients of norm weights that ride along
            pooled = 2 * hidden if name == "bert" and "pooler" in c.module + c.of else 2 * 16 * hidden
            assert pooled <= c.elements <= pooled + vectors, c
        inside = [c for c in plan.collectives if c.when == when and "*" in block_of(c.module)]
        assert Counter(c.kind for c in inside).keys() == {"all_reduce"}, "nothing is gathered inside a block"


def test_the_loss_is_vocabulary_parallel_and_logits_are_gathered_once() -> None:
    model, kwargs = make("llama")
    plan = autotp.plan(model, 2, example_inputs=kwargs)
    gathers = [c for c in plan.collectives if c.kind == "all_gather"]
    assert [c.elements for c in gathers] == [2 * 16 * 3 * 2, 2 * 16 * 1001] or [c.elements for c in gathers][::-1] == [
        2 * 16 * 3 * 2,
        2 * 16 * 1001,
    ]


def test_embedding_costs_one_reduction() -> None:
    model, kwargs = make("gpt2")
    plan = autotp.plan(model, 2, example_inputs=kwargs)
    styles = {w.name: w.style for w in plan.weights}
    assert styles["transformer.wte.weight"] == "vocabulary"
    outside = [c for c in plan.collectives if c.when == "forward" and c.kind == "all_reduce" and ".h." not in c.module]
    assert len(outside) == 1


def test_tutorial_network() -> None:
    model, kwargs = make("tutorial", batch=8, length=32)
    plan = autotp.plan(model, 4, example_inputs=kwargs)
    assert [(c.kind, c.when, c.elements) for c in plan.collectives if c.when == "forward"] == [
        ("all_reduce", "forward", 8 * 32 * 1024)
    ] * 2
    assert plan.count("backward") == 1, "the input needs no gradient"
    assert plan.share_split == 1.0
    kwargs["input"].requires_grad_(True)
    assert autotp.plan(model, 4, example_inputs=kwargs).count("backward") == 2


class _AfterIds(nn.Module):
    """A float input that needs a gradient comes after an integer one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()) + self.table(ids)


@pytest.mark.parametrize("needs", [False, True])
def test_the_gradient_of_an_input_after_ids_is_counted(needs: bool) -> None:
    x = torch.randn(2, 3, 64, requires_grad=needs)
    plan = autotp.plan(_AfterIds(), 2, example_inputs=(torch.randint(0, 11, (2, 3)), x))
    assert plan.count("backward") == needs
