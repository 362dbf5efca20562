"""Dicts among arguments, which may have another order in every process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import autotp
from autotp.arguments.arguments import Arguments
from autotp.capture.captured_graph import DenseShapes
from autotp.runtime.graph_cache import GraphCache


class Masked(nn.Module):
    """Takes masks by name, and goes through them in whatever order they have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, masks: Any) -> tuple[torch.Tensor, str]:
        y = self.down(torch.relu(self.up(x)))
        return y * masks["b"] + masks["a"], " ".join(masks)


X, A, B = torch.ones(2, 8), torch.full((2, 8), 2.0), torch.full((2, 8), 3.0)


def test_the_leaves_of_dicts_come_in_the_order_of_their_keys() -> None:
    one, other = (Arguments((X, m), {"k": [m]}) for m in ({"a": A, "b": B}, {"b": B, "a": A}))
    assert all(x is y for x, y in zip(one.leaves, other.leaves, strict=True))
    assert str(one.spec) == str(other.spec), "what ranks compare"
    assert one.spec != other.spec, "a graph holds for one order"
    assert one.spec.paths()[1:3] == ["args[1]['a']", "args[1]['b']"]


def test_a_dict_has_its_own_order_when_the_arguments_are_put_together_again() -> None:
    given = {"b": B, "a": {"d": 1, "c": [A, {"z": 2, "y": X}]}}
    of = Arguments((X,), {"last": given, "first": 0})
    args, kwargs = of.spec.unflatten(of.leaves)
    assert args[0] is X
    assert list(kwargs) == ["last", "first"]
    assert list(kwargs["last"]) == ["b", "a"]
    assert list(kwargs["last"]["a"]) == ["d", "c"]
    assert list(kwargs["last"]["a"]["c"][1]) == ["z", "y"]
    assert kwargs["last"]["a"]["c"][1]["y"] is X


def test_dicts_with_other_keys_than_strings_stay_as_they_are() -> None:
    of = Arguments(({2: A, 1: B},), {})
    assert of.leaves[0] is A
    assert not of.spec.orders


@pytest.mark.parametrize("masks", [{"a": A, "b": B}, {"b": B, "a": A}], ids=["sorted", "unsorted"])
def test_each_order_computes_what_the_model_does(masks: dict[str, torch.Tensor]) -> None:
    model = Masked()
    programs = GraphCache(model, 1, DenseShapes.of(model))
    call = programs.bind((X, masks), {})
    program = call.entry.program
    expected, names = model(X, masks)
    found, said = program.rebuild_outputs(programs.graph(program, 0)(*call.local(0)), ())
    torch.testing.assert_close(found, expected)
    assert said == names == " ".join(masks)


def test_outputs_are_never_sorted() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"z": self.linear(x), "a": x}

    model = autotp.simulate(Named(), 2, example_inputs=(X,))
    assert list(model(X)) == ["z", "a"]
