"""The comparison is worth something: break a rewritten graph in one place, and it fails.

The last test breaks gradients only: leaving out a backward reduction does not change a bit of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from autotp.capture.captured_graph import CapturedGraph
from autotp.program.sharded_program import ShardedProgram, shard_graph
from passes import ops
from passes.layouts.sharded_value import PerRank
from tests.passes.harness import Results, captured_of, randn, run, scrambled, simulation
from tests.passes.rules.test_rules import Attention, Between
from tests.verification import breakages

D = 64
INPUT = randn(2, 3, D)


class Block(nn.Module):
    """Attention with grouped heads and norms per head, and an MLP, on a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention, self.mlp = Attention(8, 2, 12, norm=True), Between(torch.tanh, 96)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp.down(self.mlp.up(self.second(x)).tanh())


@cache
def model_and_capture(kind: type[nn.Module]) -> tuple[nn.Module, CapturedGraph, Results]:
    """A model, its capture, and its dense results."""
    model = scrambled(kind())
    return model, captured_of(model, INPUT), run(model, model, [INPUT])


def program_of(kind: type[nn.Module], tp: int) -> ShardedProgram:
    """The rewritten program, made anew."""
    return shard_graph(model_and_capture(kind)[1], tp)


def compared(breakage: Callable[[fx.Graph], None], kind: type[nn.Module] = Block, tp: int = 4) -> dict[str, float]:
    """How far a broken program's outputs and gradients are from the dense model's, by name."""
    (model, _, dense), program = model_and_capture(kind), program_of(kind, tp)
    breakage(program.graph)
    program.graph.lint()
    return dense.differences(run(simulation(model, program), model, [INPUT]))


def strip(target: Callable[..., object], which: int) -> Callable[[fx.Graph], None]:
    """Take the nth call of an op out."""

    def breakage(graph: fx.Graph) -> None:
        breakages.strip(graph, [n for n in graph.nodes if n.target is target][which])

    return breakage


def double(target: Callable[..., object], which: int) -> Callable[[fx.Graph], None]:
    """Do the nth call of an op twice, one after the other."""

    def breakage(graph: fx.Graph) -> None:
        node = [n for n in graph.nodes if n.target is target][which]
        with graph.inserting_after(node):
            again = graph.call_function(target, (node, *node.args[1:]))
        again.meta = dict(node.meta)
        node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)

    return breakage


def count(target: Callable[..., object]) -> int:
    return sum(n.target is target for n in program_of(Block, 4).graph.nodes)


def test_the_whole_program_is_right() -> None:
    assert max(compared(lambda graph: None).values()) < 1e-10


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("breaks", [strip, double])
def test_an_all_reduce_left_out_or_doubled(breaks: Callable, which: int) -> None:
    assert count(ops.all_reduce) == 2
    assert compared(breaks(ops.all_reduce, which))["output 0"] > 1e-3


@pytest.mark.parametrize("breaks", [strip, double])
def test_every_enter_left_out_or_doubled(breaks: Callable) -> None:
    for which in range(count(ops.enter)):
        node = [n for n in program_of(Block, 4).graph.nodes if n.target is ops.enter][which]
        if breaks is double and isinstance(node.args[0], tuple):
            continue
        found = compared(breaks(ops.enter, which))
        assert found["output 0"] < 1e-10, "in the forward pass an enter does nothing"
        assert max(found.values()) > 1e-3, f"{node} could be changed and no gradient told"


def shifted_runs(graph: fx.Graph) -> None:
    """Move every index set of the first narrow by one."""
    node = next(n for n in graph.nodes if n.target is ops.narrow)
    runs = [tuple((a - (a > 0), b - (a > 0)) for a, b in each) for each in node.args[2].values]
    node.args = (*node.args[:2], PerRank(tuple(runs)))


def swapped_ranks(graph: fx.Graph) -> None:
    """Let the ranks take each other's part."""
    node = next(n for n in graph.nodes if n.target is ops.narrow)
    node.args = (*node.args[:2], PerRank(node.args[2].values[::-1]))


def sliced_elsewhere(graph: fx.Graph) -> None:
    """Move the window that ranks take of a fused projection."""
    node = next(n for n in graph.nodes if n.target is torch.ops.aten.slice.Tensor and n.args[2] > 0)
    node.args = (*node.args[:2], node.args[2] - 1, node.args[3] - 1)


class Narrowed(nn.Module):
    """A buffer per neuron, of which each rank takes its own part, and a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 192), nn.Linear(96, D)
        self.register_buffer("scale", torch.arange(96) / 7.0)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(a.tanh() * self.scale + b)


@pytest.mark.parametrize("breakage", [shifted_runs, swapped_ranks, sliced_elsewhere])
def test_a_shifted_index_set(breakage: Callable[[fx.Graph], None]) -> None:
    assert compared(breakage, Narrowed, tp=2)["output 0"] > 1e-3


def test_a_bias_added_on_every_rank() -> None:
    def breakage(graph: fx.Graph) -> None:
        node = next(n for n in graph.nodes if n.target is ops.row_parallel_linear)
        bias = next(n for n in graph.nodes if n.op == "get_attr" and n.target == "attention.o.bias")
        node.prepend(bias)
        node.target, node.args = torch.nn.functional.linear, (*node.args, bias)

    assert compared(breakage)["output 0"] > 1e-3


def test_a_gradient_summed_over_the_wrong_ranks() -> None:
    def breakage(graph: fx.Graph) -> None:
        nodes = [n for n in graph.nodes if n.target is ops.enter and ":" in n.args[1]]
        assert nodes, "the key-value heads are replicated"
        for node in nodes:
            node.args = (node.args[0], "tp:0,2|1,3")

    found = compared(breakage)
    assert found["output 0"] < 1e-10
    assert found["gradient of attention.k.weight"] > 1e-3


def test_programs_of_one_rank_have_no_collectives() -> None:
    assert not {n.target for n in program_of(Block, 1).graph.nodes} & {
        ops.enter,
        ops.all_reduce,
        ops.narrow,
        ops.all_gather,
    }
