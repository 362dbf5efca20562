"""Compiled graphs: layers that repeat are compiled once, and compute what the dense model does."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import autotp
from autotp.capture.capture import capture
from autotp.program.sharded_program import shard_graph
from autotp.verification.measure import Float64, relative_error
from passes import Lowered, Lowering, localize, lower
from tests.comparison import backward, outputs
from tests.models import Block, make
from tests.processes import run
from tests.program.ranks import compiled

OLD = torch.__version__ < (2, 12)
HOP = torch.ops.higher_order.invoke_subgraph


class Layers(nn.Module):
    """Layers of one structure, but those of ``other``, whose activation is another."""

    def __init__(self, count: int, other: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.into = nn.Linear(32, 32)  # so that the first layer's input has a gradient, as the others' have
        self.blocks = nn.ModuleList(Block(32, 4) for _ in range(count))
        self.other = other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for i, block in enumerate(self.blocks):
            x = block(x).relu() if i in self.other else block(x)
        return x


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, 32, dtype=torch.float64)


def lowered(model: nn.Module, grad: bool = True) -> Lowered:
    captured = capture(model, (inputs(),), {})
    graph = localize(shard_graph(captured, 1).graph, 0)
    as_is = dataclasses.replace(Lowering(), reuse=False, direct_calls=False)
    return lower(graph, 0, captured.constants, captured.regions, as_is, grad=grad)


def calls(made: Lowered) -> dict[str, int]:
    return {name: sum(n.target == name for n in made.graph.nodes) for name in made.repeated}


@pytest.mark.parametrize("grad", [True, False])
def test_layers_that_are_alike_are_one_region(grad: bool) -> None:
    for count in (3, 6):
        assert list(calls(lowered(Layers(count).double(), grad)).values()) == [count]


def test_a_layer_that_is_different_is_not_in_it() -> None:
    made = lowered(Layers(5, other=(2,)).double())
    assert sum(calls(made).values()) <= 5
    inside = {str(n.target) for g in made.repeated.values() for n in g.nodes}
    outside = {str(n.target) for n in made.graph.nodes}
    assert "aten.relu.default" in outside - inside


def test_other_widths_are_other_regions() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.into, self.wide = Layers(3), nn.Linear(32, 64), nn.ModuleList(Block(64, 4) for _ in "abc")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.into(self.narrow(x))
            for block in self.wide:
                x = block(x)
            return x

    assert list(calls(lowered(Two().double())).values()) == [3, 3]


class Counted:
    """A backend that counts what it is given to compile."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, given: Any) -> Any:
        self.graphs.append(graph)
        return aot_eager(graph, given)

    @property
    def work(self) -> int:
        """How many calls are compiled, those of a region once."""
        every = [m.graph for g in self.graphs for m in g.modules() if isinstance(m, torch.fx.GraphModule)]
        calls = [n.target for graph in every for n in graph.nodes if n.op in ("call_function", "call_method")]
        return sum(target not in (HOP, operator.getitem) for target in calls)

    @property
    def regions(self) -> list[dict[str, int]]:
        """For each graph how often it calls each region."""
        graphs = [g.graph for g in self.graphs if len(g.graph.nodes)]
        return [dict(Counter(str(n.args[1]) for n in graph.nodes if n.target is HOP)) for graph in graphs]


def compare(dense: nn.Module, model: nn.Module, call: Callable[[nn.Module], Any], grad: bool = True) -> None:
    """Outputs, and every gradient by name."""
    expected, found = outputs(call(dense)), outputs(call(model))
    for a, b in zip(expected, found, strict=True):
        assert relative_error(a, b) < 1e-10
    if not grad:
        return
    for m in (dense, model):
        m.zero_grad()
    backward(expected)
    backward(found)
    gradients = autotp.full_gradients(model)
    for n, p in dense.named_parameters():
        assert relative_error(p.grad, gradients[n]) < 1e-10, n


def test_a_region_is_compiled_once_and_sees_replaced_weights() -> None:
    sizes = []
    for count in (3, 6):
        torch._dynamo.reset()
        backend = Counted()
        with Float64(), torch._dynamo.config.patch(error_on_recompile=True):
            dense = Layers(count).double()
            model = autotp.parallelize(
                copy.deepcopy(dense), 1, compile={"backend": backend}, example_inputs=(inputs(),)
            )
            x = inputs()
            compare(dense, model, lambda m, x=x: m(x))
            assert [list(calls.values()) for calls in backend.regions] == [[count]]
            sizes.append(backend.work)
            new = nn.Parameter(torch.randn_like(dense.blocks[1].out.weight))
            for m in (dense, model):
                m.blocks[1].out.weight = nn.Parameter(new.detach().clone())
            compare(dense, model, lambda m, x=x: m(x))
            assert len(backend.graphs) == 1
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "bloom"])
def test_regions_compute_the_same(name: str) -> None:
    torch._dynamo.reset()
    backend = Counted()
    with Float64():
        dense, kwargs = make(name)
        model = autotp.parallelize(copy.deepcopy(dense), 1, compile={"backend": backend}, example_inputs=kwargs)
        compare(dense, model, lambda m: m(**kwargs))
        with torch.no_grad():
            compare(dense, model, lambda m: m(**kwargs), grad=False)
    regions = [list(calls.values()) for calls in backend.regions]
    assert regions == [[2], [2]] or (OLD and regions == [[2], [1, 1]])  # with a backward, and without


@pytest.mark.skipif(OLD, reason="torch 2.11 does not compile causal attention in float64")
def test_gradients_of_one_key_value_head_with_code() -> None:
    """Inductor mistakes where a part of a value that is one head lies, when a region saves it for its backward."""
    torch._dynamo.reset()
    torch.manual_seed(7)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    with Float64():
        config = transformers.LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=1)
        dense = transformers.LlamaForCausalLM(config).double()
        ids = torch.randint(3, 97, (2, 9))
        kwargs = {"input_ids": ids, "labels": ids}
        model = autotp.parallelize(copy.deepcopy(dense), 1, compile=True, example_inputs=kwargs)
        compare(dense, model, lambda m: m(**kwargs))
    (made,) = {g for g, _ in autotp.graph(model)._bound.values()}
    assert made.repeated, "the layers are a region"


def test_decoding_repeats_too() -> None:
    """Each layer's cache has a length of its own to the graph."""
    torch._dynamo.reset()
    backend = Counted()
    with Float64(), torch.no_grad():
        dense, kwargs = make("llama")
        ids, tokens = kwargs["input_ids"], kwargs["input_ids"][:, :1]
        model = autotp.parallelize(
            copy.deepcopy(dense), 1, compile={"backend": backend}, example_inputs={"input_ids": ids}
        )
        caches = [m(ids, use_cache=True).past_key_values for m in (dense, model)]
        for _ in range(3):
            expected, found = (
                m(tokens, past_key_values=c, use_cache=True) for m, c in zip((dense, model), caches, strict=True)
            )
            assert relative_error(expected.logits, found.logits) < 1e-10
    regions = [list(calls.values()) for calls in backend.regions]
    assert regions == [[2], [2]] or (OLD and regions == [[1, 1], [1, 1]])  # of the prompt, and of all tokens


@pytest.mark.skipif(OLD, reason="torch 2.11 does not compile causal attention in float64")
def test_numbers_of_torchs_own_compiler() -> None:
    """Code that Inductor makes, by a mode that asks for CUDA graphs, of which a CPU has none."""
    torch._dynamo.reset()
    with Float64():
        dense = Layers(3).double()
        model = autotp.parallelize(copy.deepcopy(dense), 1, compile="reduce-overhead", example_inputs=(inputs(),))
        given = inputs()
        compare(dense, model, lambda m: m(given))
        for length in (5, 7):
            with torch.no_grad():
                x = torch.randn(2, length, 32, dtype=torch.float64)
                compare(dense, model, lambda m, x=x: m(x), grad=False)


def test_what_is_refused_as_a_region_is_compiled_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise torch._dynamo.exc.Unsupported("a region", "none")

    torch._dynamo.reset()
    backend = Counted()
    with Float64():
        dense = Layers(3).double()
        model = autotp.parallelize(copy.deepcopy(dense), 1, compile={"backend": backend}, example_inputs=(inputs(),))
        x = inputs()
        with monkeypatch.context() as patched:
            home = "invoke_subgraph" if find_spec("torch._dynamo.variables.invoke_subgraph") else "higher_order_ops"
            refused = f"torch._dynamo.variables.{home}.InvokeSubgraphHigherOrderVariable._call_function"
            patched.setattr(refused, refuse)
            with pytest.warns(UserWarning, match="compiled each"):
                compare(dense, model, lambda m: m(x))
    assert backend.regions == [{}]


def test_on_two_processes(tmp_path: Path) -> None:
    """Whole, with its backward and collectives; by argument and by ``torch.compile`` of a parallelized model."""
    for rank, result in enumerate(run(2, compiled, out=tmp_path / "compiled")):
        assert "error" not in result, f"rank {rank}:\n{result['error']}"
        for how, found in result.items():
            assert found["graphs"] > 0, how
            assert found["calls"] == 2 * found["graphs"], how
            assert found["outputs"] < 1e-7, how
        assert result["argument"]["collectives"] > 0
        assert max(result["argument"]["gradients"].values()) < 1e-7, result["argument"]["gradients"]
