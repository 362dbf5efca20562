"""simulate: all ranks in lockstep in this one process, callable like the model, differentiable."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from autotp.capture.example_inputs import ExampleInputs
from autotp.partition.partition import CapturedModule, Partition
from autotp.partition.prepare import prepare
from autotp.plans.make_plan import announce, plan_of
from autotp.program.sharded_program import ShardedProgram
from autotp.runtime.graph_cache import GraphCache
from autotp.verification.threads import World, lockstep
from autotp.weights.slicing import local_part, shards_of, unshard
from passes import Layout, Lowering, Shards

__all__ = ["Recorder", "Simulation", "simulate"]


class Recorder(fx.Interpreter):
    """Runs one rank's graph, on given weights if there are some, and keeps what is whole on all ranks.

    Attributes:
        seen: each hidden value that should be the same on every rank, by node name.
    """

    def __init__(
        self, graph: fx.GraphModule, weights: Mapping[str, torch.Tensor] | None = None, record: bool = True
    ) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.weights, self.record = weights or {}, record
        self.seen: dict[str, torch.Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The weight given under this name, or else the graph's own."""
        return self.weights[target] if target in self.weights else super().get_attr(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and keep its value if it is a whole one."""
        value = super().run_node(n)
        whole = n.op == "call_function" and n.meta.get("type") in ("I", "R")
        if self.record and whole and isinstance(value, torch.Tensor):
            self.seen[n.name] = value.detach()
        return value


class _AllRanks(torch.autograd.Function):
    """One call of all ranks' programs as one function of the dense weights and the inputs.

    Every rank holds the same result and, in a real run, starts its backward from the same loss; so
    each gets the whole gradient of the result. A weight's gradient is read where the weight lives: of
    an index that several ranks hold, from the lowest of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        simulation: Simulation,
        part: CapturedModule,
        rewritten: ShardedProgram,
        tracking: bool,
        *tensors: torch.Tensor,
    ) -> Any:
        count, names = len(part.names), list(part.names)
        weights, inputs = tensors[:count], tensors[count:]
        needs = [tracking and t.requires_grad for t in tensors]

        def work(rank: int) -> Any:
            local = {}
            leaves = []
            for name, weight, need in zip(names, weights, needs, strict=False):
                held = local_part(weight.detach(), shards_of(rewritten.weight_layouts, name), rank)
                held = held.clone().requires_grad_(need) if need else held
                leaves.append(held)
                local[name] = held
            own = []
            for i, (x, need) in enumerate(zip(inputs, needs[count:], strict=True)):
                held = local_part(x.detach(), places(rewritten.inputs, i), rank).clone()  # a cache is written to
                own.append(held.requires_grad_(True) if need else held)
            leaves += own
            with torch.set_grad_enabled(tracking):
                results = simulation.run(part, rewritten, rank, local, own)
            return leaves, results

        ran = lockstep(simulation.tp, simulation.world, work)
        ctx.simulation, ctx.rewritten, ctx.ran, ctx.needs, ctx.part = simulation, rewritten, ran, needs, part
        simulation.compare([results for _, results in ran], rewritten.results)
        first = tuple(
            unshard([_detached(results[i]) for _, results in ran], places(rewritten.results, i))
            for i in range(len(ran[0][1]))
        )
        ctx.mark_non_differentiable(
            *[d for d, r in zip(first, ran[0][1], strict=True) if isinstance(d, torch.Tensor) and not _needs_grad(r)]
        )
        return first

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        simulation, rewritten, names = ctx.simulation, ctx.rewritten, list(ctx.part.names)

        def work(rank: int) -> Any:
            leaves, results = ctx.ran[rank]
            pairs = [
                (r, local_part(g, places(rewritten.results, i), rank))
                for i, (r, g) in enumerate(zip(results, grads, strict=True))
                if _needs_grad(r)
            ]
            wanted = [x for x in leaves if x.requires_grad]
            with torch.autograd.set_multithreading_enabled(False):
                found = torch.autograd.grad(
                    [r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, retain_graph=True
                )
            each = iter(found)
            return [next(each) if x.requires_grad else None for x in leaves]

        by_rank = lockstep(simulation.tp, simulation.world, work)
        out: list[Any] = [None, None, None, None]
        for i, need in enumerate(ctx.needs):
            parts = [each[i] for each in by_rank]
            if not need or parts[0] is None:
                out.append(None)
                continue
            weight = i < len(names)
            held = shards_of(rewritten.weight_layouts, names[i]) if weight else places(rewritten.inputs, i - len(names))
            simulation.compare_replicas(names[i] if weight else f"input {i - len(names)}", held, parts)
            out.append(unshard(parts, held))
        return tuple(out)


def places(layouts: Mapping[int, Layout], position: int) -> dict[int, Shards]:
    """The split dims of an input or a result, by dim."""
    return layouts[position].dims if position in layouts else {}


def _needs_grad(result: Any) -> bool:
    return isinstance(result, torch.Tensor) and result.requires_grad


def _detached(result: Any) -> Any:
    return result.detach() if isinstance(result, torch.Tensor) else result


class Simulation(nn.Module):
    """All ranks of a tensor-parallel model, run in lockstep threads on the dense model's own weights.

    Call it as the model; outputs and gradients are those of rank 0. After each call ``divergence``
    is the largest difference between ranks of any value that is whole on all of them, ``0.0`` if the
    ranks agree to the bit, and ``diverging`` names the first such value (``record=True``: hidden
    values are compared too, not only results). With ``lowering`` the lowered programs run, as they do in
    processes, else the rewritten ones as they are printed.
    """

    def __init__(
        self,
        model: nn.Module,
        tp: int,
        programs: GraphCache | Partition,
        record: bool = False,
        lowering: Lowering | None = None,
    ) -> None:
        super().__init__()
        self.lowering = lowering
        self.__dict__["model"] = model  # not a child: its parameters are its own
        self.division = programs if isinstance(programs, Partition) else Partition.whole(model, programs)
        self.tp, self.record = tp, record
        self.world = World(tp)
        self.reads = self.division.outside_of_parts()
        self.divergence, self.diverging = 0.0, ""
        self.train(model.training)
        self._seen: list[dict[str, torch.Tensor]] = [{} for _ in range(tp)]

    model: nn.Module

    @property
    def cache(self) -> GraphCache:
        """The graphs of a model that was captured whole."""
        (part,) = self.division.parts
        return part.cache

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, all ranks at once where it runs as graphs."""
        self.divergence, self.diverging = 0.0, ""
        self.reads = self.division.outside_of_parts()
        with self.division.running(self._all_ranks), self.reads:
            return self.model(*args, **kwargs)

    def _all_ranks(self, part: CapturedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with self.reads.suspend():
            call = part.cache.bind(args, kwargs)
            program = call.entry.program
            if program.random and not self.division.is_whole:  # as in processes, where a checkpoint may run it again
                self.world.restart(int(torch.empty((), dtype=torch.int64).random_(1 << 62)))
            weights = dict(part.module.named_parameters(remove_duplicate=False))
            flat = [weights[n] for n in part.names]
            inputs = program.graph.find_nodes(op="placeholder")  # what is not read may have a graph that is gone
            given = [x if node.users else x.detach() for x, node in zip(call.tensors, inputs, strict=True)]
            inference = program.captured.outputs.inference
            with torch.no_grad() if inference else contextlib.nullcontext():
                results = _AllRanks.apply(self, part, program, torch.is_grad_enabled(), *flat, *given)
                return program.unflatten(results, call.objects)

    def run(
        self,
        part: CapturedModule,
        rewritten: ShardedProgram,
        rank: int,
        weights: dict[str, torch.Tensor],
        inputs: list[torch.Tensor],
    ) -> Any:
        """One rank's program on its weights."""
        own = {alias: weights[name] for alias, name in part.aliases.items()}
        graph = part.cache.graph(rewritten, rank)
        if self.lowering is not None:
            lowered = graph.lowered(self.lowering, torch.is_grad_enabled())
            return tuple(lowered.run(*inputs, *(self._weight(part.module, own, n) for n in lowered.weights)))
        recorder = Recorder(graph, own, self.record)
        results = recorder.run(*inputs)
        self._seen[rank] = recorder.seen
        return tuple(results)

    @staticmethod
    def _weight(module: nn.Module, own: dict[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
        """A weight of a lowered graph, or several of them side by side."""
        found = [own[n] if n in own else module.get_buffer(n) for n in names]
        return found[0] if len(found) == 1 else torch.cat([t.detach() for t in found])

    def compare(self, results: list[tuple[Any, ...]], parts: Mapping[int, Layout]) -> None:
        """Record how far the ranks' results, and recorded hidden values, are apart; not of what each keeps in part."""
        for name, value in self._seen[0].items():
            for other in self._seen[1:]:
                self._note(name, value, other[name])
        for i, value in enumerate(results[0]):
            for each in results[1:]:
                if isinstance(value, torch.Tensor) and i not in parts:
                    self._note(f"result {i}", value.detach(), each[i].detach())
        self._seen = [{} for _ in range(self.tp)]

    def compare_replicas(self, name: str, places: Any, grads: list[torch.Tensor]) -> None:
        """Record how far the ranks' gradients of what several of them hold are apart."""
        if not places:
            for other in grads[1:]:
                self._note(f"gradient of {name}", grads[0], other)

    def _note(self, name: str, value: torch.Tensor, other: torch.Tensor) -> None:
        if torch.equal(value, other) or (
            (value.isnan() == other.isnan()).all() and torch.equal(value.nan_to_num(), other.nan_to_num())
        ):
            return
        apart = float((value.double() - other.double()).abs().max())
        self.diverging = self.diverging or name
        self.divergence = max(self.divergence, apart)


def simulate(model: nn.Module, tp: int, *, example_inputs: ExampleInputs = None, record: bool = False) -> Simulation:
    """All ``tp`` ranks of ``model`` in lockstep in this process.

    Args:
        model: the dense model; it keeps its weights, which the simulation reads at each call and to
            which its backward adds gradients.
        tp: the number of ranks.
        example_inputs: as for :func:`autotp.parallelize`.
        record: compare hidden values between ranks too.

    Example:
        >>> parallel = autotp.simulate(model, tp=4)
        >>> parallel(input_ids=ids).logits  # as model(input_ids=ids).logits
    """
    division = prepare(model, tp, example_inputs)
    announce(plan_of(division, tp), division)
    return Simulation(model, tp, division, record)
