"""What may have another order in every process: dicts among arguments, and the lines of a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import autotp
from autotp.arguments.arguments import Arguments
from autotp.capture.captured_graph import DenseShapes
from autotp.runtime.graph_cache import GraphCache
from autotp.utils.graph_hash import graph_hash
from passes import ops


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
    args, kwargs = of.spec.close(of.leaves)
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
    program, of = programs.find((X, masks), {})
    expected, names = model(X, masks)
    found, said = program.unflatten(programs.graph(program, 0)(*of.local(program.inputs, 0)))
    torch.testing.assert_close(found, expected)
    assert said == names == " ".join(masks)


def _graph(change: Callable[[fx.Graph], Any] = lambda graph: None) -> int:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    program, _ = GraphCache(model, 2, DenseShapes.of(model)).find((torch.ones(2, 64),), {})
    graph = copy.deepcopy(program.graph)
    change(graph)
    return graph_hash(graph, {})


def _renamed(graph: fx.Graph) -> None:
    for i, node in enumerate(list(graph.nodes)):
        node.name = f"n{i}_of_another"


def _moved(graph: fx.Graph) -> None:
    """An op that does not communicate, as early as it can be."""
    node = next(n for n in graph.nodes if n.op == "call_function" and n.target is ops.row_parallel_linear)
    weight = next(n for n in graph.nodes if n.op == "get_attr" and n.name != node.args[1].name)
    next(iter(graph.nodes)).append(weight)


def _retargeted(graph: fx.Graph) -> None:
    next(n for n in graph.nodes if n.target is ops.column_parallel_linear).target = torch.nn.functional.linear


def _rewired(graph: fx.Graph) -> None:
    first, second = [n for n in graph.nodes if n.op == "get_attr" and str(n.target).endswith("weight")][:2]
    for user in list(first.users):
        user.replace_input_with(first, second)


def test_names_and_places_do_not_count_and_all_else_does() -> None:
    same = _graph()
    assert _graph(_renamed) == _graph(_moved) == same
    assert len({same, _graph(_retargeted), _graph(_rewired)}) == 3


def test_the_order_of_what_communicates_counts() -> None:
    def both(first: int) -> int:
        graph = fx.Graph()
        x, y = graph.placeholder("x"), graph.placeholder("y")
        sums: dict[int, fx.Node] = {}
        for i in (first, 1 - first):
            sums[i] = graph.call_function(ops.all_reduce, ((x, y)[i], "tp"))
        graph.output((sums[0], sums[1]))
        return graph_hash(graph, {})

    assert both(0) != both(1)


def test_constants_count_by_value() -> None:
    def of(name: str, value: float) -> int:
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.add, (x, graph.get_attr(name))),))
        return graph_hash(graph, {name: torch.tensor(value)})

    assert of("a", 1.0) == of("b", 1.0) != of("a", 2.0)


def test_outputs_are_never_sorted() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"z": self.linear(x), "a": x}

    model = autotp.simulate(Named(), 2, example_inputs=(X,))
    assert list(model(X)) == ["z", "a"]
