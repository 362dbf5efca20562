"""The comparison is worth something: break a rewritten graph in one place and it must fail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from autotp.capture.capture import capture
from autotp.capture.captured_graph import CapturedGraph
from autotp.program.sharded_program import shard_graph
from autotp.verification.measure import Float64
from autotp.verification.report import Report
from autotp.verification.simulation import Simulation
from autotp.verification.verify import compare
from passes import ops
from passes.layouts.sharded_value import PerRank
from passes.ops.vocabulary import vocab_parallel_embedding
from tests.models import make
from tests.passes.harness import OneProgram
from tests.verification import breakages


@functools.cache
def _captured(name: str) -> tuple[nn.Module, dict[str, Any], CapturedGraph]:
    with Float64():
        model, kwargs = make(name)
        return model, kwargs, capture(model, (), kwargs)


def _broken(name: str, tp: int, damage: Callable[[fx.Graph], None]) -> Report | Exception:
    """Compare with the dense model after ``damage`` to a graph rewritten anew."""
    model, kwargs, captured = _captured(name)
    program = shard_graph(captured, tp)
    damage(program.graph)
    with Float64():
        try:
            return compare(model, Simulation(model, tp, OneProgram(model, program), record=True), (), kwargs)
        except (RuntimeError, AssertionError) as error:  # shapes no longer fit
            return error


def _caught(found: Report | Exception) -> bool:
    return isinstance(found, Exception) or not found.ok


def _collectives(name: str, tp: int) -> list[str]:
    program = shard_graph(_captured(name)[2], tp)
    kinds = (ops.all_reduce, ops.all_gather, ops.enter)
    return [n.name for n in program.graph.nodes if n.target in kinds]


def _strip(node_name: str) -> Callable[[fx.Graph], None]:
    def damage(graph: fx.Graph) -> None:
        breakages.strip(graph, next(n for n in graph.nodes if n.name == node_name))

    return damage


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_without_any_one_collective_the_comparison_fails(name: str) -> None:
    found = _collectives(name, 3)
    assert len(found) > 8
    missed = [n for n in found if not _caught(_broken(name, 3, _strip(n)))]
    assert missed == []


def test_untouched_it_passes() -> None:
    report = _broken("gpt", 3, lambda graph: None)
    assert isinstance(report, Report)
    assert report.ok, str(report)


def test_without_an_enter_only_gradients_are_wrong() -> None:
    enter = next(n for n in _collectives("gpt", 2) if "ln1_enter" in n)
    report = _broken("gpt", 2, _strip(enter))
    assert isinstance(report, Report)
    assert report.worst_output < 1e-12
    assert report.worst_gradient[1] > 1e-3
    assert report.divergence == 0.0 or "gradient" in report.diverging


def test_a_shard_shifted_by_one_is_found() -> None:
    def damage(graph: fx.Graph) -> None:
        node = next(n for n in graph.nodes if n.target is vocab_parallel_embedding)
        starts = node.args[2].values
        node.args = (*node.args[:2], PerRank((starts[0], *(s + 1 for s in starts[1:]))), *node.args[3:])

    assert _caught(_broken("gpt", 3, damage))


def test_a_bias_added_before_the_reduction_is_found() -> None:
    def damage(graph: fx.Graph) -> None:
        node = next(n for n in graph.nodes if n.target is ops.row_parallel_linear)
        reduced = next(iter(node.users))
        bias = next(n for n in graph.nodes if n.op == "get_attr" and n.target == "blocks.0.out.bias")
        with graph.inserting_after(node):
            added = graph.call_function(torch.ops.aten.add.Tensor, (node, bias))
        added.meta = dict(node.meta)
        reduced.replace_input_with(node, added)
        if list(graph.nodes).index(bias) > list(graph.nodes).index(added):
            node.prepend(bias)

    assert _caught(_broken("gpt", 2, damage))


def test_ranks_that_draw_their_own_dropout_on_whole_values_are_found() -> None:
    """A dropout that should be the same on all ranks, drawn by each rank for itself."""
    with Float64():
        model, kwargs = make("encoder")
        model.train()
        program = shard_graph(capture(model, (), kwargs), 2)
        simulation = Simulation(model, 2, OneProgram(model, program), record=True)
        simulation(**kwargs)
        assert simulation.divergence == 0.0
        for node in program.graph.nodes:
            if node.target is ops.random_same:
                node.target = ops.random_per_rank
        simulation = Simulation(model, 2, OneProgram(model, program), record=True)
        simulation(**kwargs)
        assert simulation.divergence > 0.0
