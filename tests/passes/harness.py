"""One comparison for all tests of the passes: every rank's rewritten graph against the dense model.

A model is captured once and rewritten for each number of ranks; all ranks run in lockstep in float64,
and every output and every gradient, by name, must agree with the dense model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from autotp.arguments.arguments import Arguments
from autotp.arguments.module_state import ModuleStateTracker
from autotp.capture.capture import capture
from autotp.capture.captured_graph import CapturedGraph, DenseShapes
from autotp.program.rank_graph import RankGraph
from autotp.program.sharded_program import ShardedProgram, shard_graph
from autotp.runtime.bound_call import BoundCall, CacheEntry
from autotp.verification.simulation import Simulation
from passes import Layout, Lowering, Shards
from passes import check as prove

CLOSE = 1e-10
torch.set_num_threads(1)  # the ranks are threads already
COLLECTIVES = ("all_reduce", "all_gather", "vocab_parallel_cross_entropy")
MOVES = ("enter", "enter_overlapping", "narrow")


class OneProgram:
    """Stands where :class:`autotp.runtime.graph_cache.GraphCache` does, with one given program."""

    def __init__(self, model: nn.Module, program: ShardedProgram) -> None:
        self.model, self.last, self._graphs = model, program, {}
        self.captures = SimpleNamespace(dense=DenseShapes.of(model))
        self.state = ModuleStateTracker(model)

    def bind(self, args: Any, kwargs: Any) -> BoundCall:
        arguments = Arguments(args, kwargs)
        return BoundCall(CacheEntry(0, self.last), arguments.tensors, arguments.objects, ())

    def graph(self, program: ShardedProgram, rank: int) -> RankGraph:
        return self._graphs.setdefault(rank, RankGraph(program, rank, self.model))


def scrambled(model: nn.Module) -> nn.Module:
    """A model in float64 whose biases are off zero and whose norm weights are off one."""
    torch.manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1) + (0.5 if p.dim() == 1 else 0))
    return model


def randn(*shape: int) -> torch.Tensor:
    """A float64 input that wants a gradient; the same for the same shape."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


_CAPTURED: WeakKeyDictionary[nn.Module, CapturedGraph] = WeakKeyDictionary()


def captured_of(model: nn.Module, *inputs: torch.Tensor) -> CapturedGraph:
    """A model's capture, as :mod:`autotp` makes it; made once, for tests call a model in one way only."""
    if model not in _CAPTURED:
        captured = capture(model, inputs, {})
        if not isinstance(captured, CapturedGraph):
            raise captured.error()
        _CAPTURED[model] = captured
    return _CAPTURED[model]


@dataclass
class Results:
    """The outputs of a run and the gradients of a fixed function of them, by name."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]

    def differences(self, other: Results) -> dict[str, float]:
        """How far apart two runs are, relative to the largest entry, by name of output or gradient."""
        found = {f"output {i}": apart(a, b) for i, (a, b) in enumerate(zip(self.outputs, other.outputs, strict=True))}
        for name, gradient in self.gradients.items():
            found[f"gradient of {name}"] = apart(gradient, other.gradients[name])
        return found


def apart(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """The largest difference, relative to the largest entry; a missing gradient is a zero one."""
    if a is None or b is None:
        present = a if a is not None else b
        return 0.0 if present is None else float(present.abs().max())
    assert a.shape == b.shape, (a.shape, b.shape)
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    if not a.numel():
        return 0.0
    largest = max(float(a.double().abs().max()), 1e-2)  # a gradient that is zero but for rounding is zero
    return float((a.double() - b.double()).abs().max()) / largest


def run(called: Callable[..., Any], model: nn.Module, inputs: Iterable[torch.Tensor]) -> Results:
    """Call and go backward from a random function of the outputs."""
    model.zero_grad()
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    outputs = [x for x in pytree.tree_leaves(called(*inputs)) if isinstance(x, torch.Tensor)]
    generator = torch.Generator().manual_seed(2)
    differentiable = [x for x in outputs if x.requires_grad]
    if differentiable:
        terms = [(x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in differentiable]
        sum(terms[1:], terms[0]).backward()
    gradients = {n: p.grad.clone() if p.grad is not None else None for n, p in model.named_parameters()}
    gradients |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    return Results([x.detach() for x in outputs], gradients)


def called(graph: fx.Graph, names: Iterable[str]) -> dict[str, int]:
    """How often a graph calls each of the named parallel ops, without those it does not call."""
    count = Counter(getattr(n.target, "__name__", "") for n in graph.nodes if n.op == "call_function")
    return {name: count[name] for name in names if count[name]}


def simulation(model: nn.Module, program: ShardedProgram, lowering: Lowering | None = None) -> Simulation:
    """All ranks of a given program in lockstep, lowered or as it is."""
    return Simulation(model, program.tp, OneProgram(model, program), record=True, lowering=lowering)


def check(
    model: nn.Module,
    *inputs: torch.Tensor,
    split: Mapping[str, int] | None = None,
    collectives: Mapping[str, int] | None = None,
    moves: Mapping[str, int] | None = None,
    tps: Iterable[int] = (2, 3, 4),
    weight_layouts: Callable[[int], Mapping[str, Layout]] | None = None,
) -> list[ShardedProgram]:
    """Compare all ranks with the dense model, for each number of ranks.

    Args:
        model: any module; its parameters are overwritten by random ones.
        inputs: its inputs.
        split: which parameters should be split, and along which dim; all others should be whole.
        collectives: the collectives of the forward pass, by name (not looked at by default).
        moves: how many ``enter``, ``enter_overlapping``, ``narrow`` (not looked at by default).
        tps: the numbers of ranks.
        weight_layouts: the weights' layouts for a number of ranks, instead of those that ``decide`` chooses.

    Returns:
        The rewritten programs.
    """
    model = scrambled(model)
    captured = captured_of(model, *inputs)
    dense = run(model, model, inputs)
    programs = []
    for tp in tps:
        program = shard_graph(captured, tp, weight_layouts(tp) if weight_layouts is not None else None)
        if split is not None:
            dims = {name: layout.shards[0][0] for name, layout in program.weight_layouts.items()}
            assert dims == dict(split), f"tp {tp}: {dims}, {program.reasons}\n{program.graph}"
        if collectives is not None:
            assert called(program.graph, COLLECTIVES) == dict(collectives), f"tp {tp}\n{program.graph}"
        if moves is not None:
            assert called(program.graph, MOVES) == dict(moves), f"tp {tp}\n{program.graph}"
        verdict = prove(captured.graph, program.graph, program.weight_layouts, captured.parameters, tp)
        assert verdict.proved, f"tp {tp}: {verdict}\n{program.graph}"
        parallel = simulation(model, program)
        for name, difference in dense.differences(run(parallel, model, inputs)).items():
            assert difference < CLOSE, f"tp {tp}: {name} is off by {difference:.2g}\n{program.graph}"
        assert parallel.divergence == 0.0, f"tp {tp}: the ranks differ in {parallel.diverging}"
        check_lowered(model, program, inputs, dense)
        programs.append(program)
    return programs


def check_lowered(model: nn.Module, program: ShardedProgram, inputs: Iterable[torch.Tensor], dense: Results) -> None:
    """Compare all ranks' lowered programs with the dense model: with a backward, and forward only."""
    inputs = list(inputs)
    parallel = simulation(model, program, Lowering())
    for name, difference in dense.differences(run(parallel, model, inputs)).items():
        assert difference < CLOSE, f"lowered, {name} is off by {difference:.2g}\n{texts(model, program, True)}"
    with torch.no_grad():
        outputs = [x for x in pytree.tree_leaves(parallel(*inputs)) if isinstance(x, torch.Tensor)]
    for i, (a, b) in enumerate(zip(dense.outputs, outputs, strict=True)):
        difference = apart(a, b)
        assert difference < CLOSE, f"lowered, output {i} is off by {difference:.2g}\n{texts(model, program, False)}"
    assert parallel.divergence == 0.0, f"lowered: the ranks differ in {parallel.diverging}"


def texts(model: nn.Module, program: ShardedProgram, grad: bool) -> str:
    """A program of the first rank as it is and lowered."""
    graph = RankGraph(program, 0, model)
    return f"{graph}\n\n{graph.lowered(Lowering(), grad)}"


def sets(shards: Shards) -> list[list[int]]:
    """Per rank, the indices as a list."""
    return [s.indices.tolist() for s in shards.ranks]
