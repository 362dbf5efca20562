"""Hashes of graphs, by which ranks compare them: names and the order of lines do not count, all else does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from autotp.capture.captured_graph import DenseShapes
from autotp.runtime.graph_cache import GraphCache
from autotp.utils.graph_hash import graph_hash
from passes import ops


def _graph(change: Callable[[fx.Graph], Any] = lambda graph: None) -> int:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    call = GraphCache(model, 2, DenseShapes.of(model)).bind((torch.ones(2, 64),), {})
    graph = copy.deepcopy(call.entry.program.graph)
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


@pytest.mark.parametrize(
    ("op", "options"),
    [(ops.all_reduce, ("tp",)), (ops.norm_over_shards, (None, None, 1e-5, (2, 2), True, "tp"))],
    ids=["all_reduce", "norm_over_shards"],
)
def test_the_order_of_what_communicates_counts(op: Callable[..., Any], options: tuple[Any, ...]) -> None:
    def both(first: int) -> int:
        graph = fx.Graph()
        x, y = graph.placeholder("x"), graph.placeholder("y")
        sums: dict[int, fx.Node] = {}
        for i in (first, 1 - first):
            sums[i] = graph.call_function(op, ((x, y)[i], *options))
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
