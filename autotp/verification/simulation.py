"""simulation: all ranks of a model in lockstep in one process, called and differentiated like the model."""

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
    """Runs one rank's graph and records its replicated values.

    Args:
        graph: the rank's graph.
        weights: values of weights by name; the graph's own are used for the others.
        record: whether to record values.

    Attributes:
        seen: the hidden values that should be the same on every rank, by node name.
    """

    def __init__(
        self, graph: fx.GraphModule, weights: Mapping[str, torch.Tensor] | None = None, record: bool = True
    ) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.weights, self.record = weights or {}, record
        self.seen: dict[str, torch.Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The value of a weight: a given one, else the graph's own."""
        return self.weights[target] if target in self.weights else super().get_attr(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and record its value if it is replicated."""
        value = super().run_node(n)
        replicated = n.op == "call_function" and n.meta.get("type") in ("I", "R")
        if self.record and replicated and isinstance(value, torch.Tensor):
            self.seen[n.name] = value.detach()
        return value


class _AllRanks(torch.autograd.Function):
    """One call of all ranks' programs, as one function of the dense weights and the inputs.

    All ranks have the same result. In a real run each starts its backward from the same loss, so here each gets the
    full gradient of the result. The full gradient of a weight is unsharded from the ranks' gradients; of an index
    that several ranks hold, the lowest rank's is taken.
    """

    @staticmethod
    def forward(
        ctx: Any,
        simulation: Simulation,
        part: CapturedModule,
        program: ShardedProgram,
        tracking: bool,
        *tensors: torch.Tensor,
    ) -> Any:
        count, names = len(part.names), list(part.names)
        weights, inputs = tensors[:count], tensors[count:]
        needs = [tracking and t.requires_grad for t in tensors]

        def work(rank: int) -> Any:
            own_weights = {}
            for name, weight, need in zip(names, weights, needs, strict=False):
                shard = local_part(weight.detach(), shards_of(program.weight_layouts, name), rank)
                own_weights[name] = shard.clone().requires_grad_(need) if need else shard
            own_inputs = []
            for i, (x, need) in enumerate(zip(inputs, needs[count:], strict=True)):
                shard = local_part(x.detach(), split_dims(program.inputs, i), rank).clone()  # a cache is written to
                own_inputs.append(shard.requires_grad_(True) if need else shard)
            with torch.set_grad_enabled(tracking):
                results = simulation.run(part, program, rank, own_weights, own_inputs)
            return [*own_weights.values(), *own_inputs], results

        runs = lockstep(simulation.tp, simulation.world, work)
        ctx.simulation, ctx.program, ctx.runs, ctx.needs, ctx.part = simulation, program, runs, needs, part
        by_rank = [results for _, results in runs]
        simulation.compare(by_rank, program.results)
        full = tuple(
            unshard([_detached(results[i]) for results in by_rank], split_dims(program.results, i))
            for i in range(len(by_rank[0]))
        )
        ctx.mark_non_differentiable(
            *[x for x, r in zip(full, by_rank[0], strict=True) if isinstance(x, torch.Tensor) and not _needs_grad(r)]
        )
        return full

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        simulation, program, names = ctx.simulation, ctx.program, list(ctx.part.names)

        def work(rank: int) -> Any:
            leaves, results = ctx.runs[rank]
            pairs = [
                (r, local_part(g, split_dims(program.results, i), rank))
                for i, (r, g) in enumerate(zip(results, grads, strict=True))
                if _needs_grad(r)
            ]
            differentiable = [x for x in leaves if x.requires_grad]
            with torch.autograd.set_multithreading_enabled(False):
                gradients = torch.autograd.grad(
                    [r for r, _ in pairs], differentiable, [g for _, g in pairs], allow_unused=True, retain_graph=True
                )
            remaining = iter(gradients)
            return [next(remaining) if x.requires_grad else None for x in leaves]

        by_rank = lockstep(simulation.tp, simulation.world, work)
        out: list[Any] = [None, None, None, None]
        for i, need in enumerate(ctx.needs):
            shards = [gradients[i] for gradients in by_rank]
            if not need or shards[0] is None:
                out.append(None)
                continue
            if i < len(names):
                name, dims = names[i], shards_of(program.weight_layouts, names[i])
            else:
                name, dims = f"input {i - len(names)}", split_dims(program.inputs, i - len(names))
            if not dims:
                simulation.compare_gradients(name, shards)
            out.append(unshard(shards, dims))
        return tuple(out)


def split_dims(layouts: Mapping[int, Layout], position: int) -> dict[int, Shards]:
    """The split dims of an input or a result, with their shards."""
    return layouts[position].dims if position in layouts else {}


def _needs_grad(result: Any) -> bool:
    return isinstance(result, torch.Tensor) and result.requires_grad


def _detached(result: Any) -> Any:
    return result.detach() if isinstance(result, torch.Tensor) else result


class Simulation(nn.Module):
    """All ranks of a tensor-parallel model, run in lockstep threads on the dense model's own weights.

    Call it as the model; outputs and gradients are those of rank 0. After each call ``divergence`` is the largest
    difference between ranks in a replicated value, ``0.0`` if all ranks have the same bits, and ``diverging`` names the
    first value in which they differ. Results are compared, and with ``record=True`` hidden values too. With
    ``lowering`` the lowered programs run, as in processes, else the rewritten ones as they are printed.
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
        self.__dict__["model"] = model  # not as a child: the model's parameters are not the simulation's
        self.partition = programs if isinstance(programs, Partition) else Partition.whole(model, programs)
        self.tp, self.record = tp, record
        self.world = World(tp)
        self.reads = self.partition.outside_of_parts()
        self.divergence, self.diverging = 0.0, ""
        self.train(model.training)
        self._seen: list[dict[str, torch.Tensor]] = [{} for _ in range(tp)]

    model: nn.Module

    @property
    def cache(self) -> GraphCache:
        """The graph cache of a model that was captured whole."""
        (part,) = self.partition.parts
        return part.cache

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, with all ranks in lockstep in each captured module."""
        self.divergence, self.diverging = 0.0, ""
        self.reads = self.partition.outside_of_parts()
        with self.partition.running(self._all_ranks), self.reads:
            return self.model(*args, **kwargs)

    def _all_ranks(self, part: CapturedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a captured module on all ranks."""
        with self.reads.suspend():
            call = part.cache.bind(args, kwargs)
            program = call.entry.program
            if program.random and not self.partition.is_whole:  # as in processes, where a checkpoint may run it again
                self.world.restart(int(torch.empty((), dtype=torch.int64).random_(1 << 62)))
            weights = dict(part.module.named_parameters(remove_duplicate=False))
            flat = [weights[n] for n in part.names]
            nodes = program.graph.find_nodes(op="placeholder")  # an unused input's autograd graph may be freed already
            inputs = [x if node.users else x.detach() for x, node in zip(call.tensors, nodes, strict=True)]
            inference = program.captured.outputs.inference
            with torch.no_grad() if inference else contextlib.nullcontext():
                results = _AllRanks.apply(self, part, program, torch.is_grad_enabled(), *flat, *inputs)
                return program.rebuild_outputs(results, call.objects)

    def run(
        self,
        part: CapturedModule,
        program: ShardedProgram,
        rank: int,
        weights: dict[str, torch.Tensor],
        inputs: list[torch.Tensor],
    ) -> Any:
        """Run one rank's program on the rank's weights and inputs."""
        own = {alias: weights[name] for alias, name in part.aliases.items()}
        graph = part.cache.graph(program, rank)
        if self.lowering is not None:
            lowered = graph.lowered(self.lowering, torch.is_grad_enabled())
            return tuple(lowered.run(*inputs, *(self._weight(part.module, own, n) for n in lowered.weights)))
        recorder = Recorder(graph, own, self.record)
        results = recorder.run(*inputs)
        self._seen[rank] = recorder.seen
        return tuple(results)

    @staticmethod
    def _weight(module: nn.Module, own: dict[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
        """A weight of a lowered graph; one of several names is their concatenation."""
        weights = [own[n] if n in own else module.get_buffer(n) for n in names]
        return weights[0] if len(weights) == 1 else torch.cat([w.detach() for w in weights])

    def compare(self, results: list[tuple[Any, ...]], layouts: Mapping[int, Layout]) -> None:
        """Record the differences between the ranks' results, and between their recorded hidden values.

        Args:
            results: the results by rank.
            layouts: the layouts of sharded results, by position; these are not compared.
        """
        for name, value in self._seen[0].items():
            for other in self._seen[1:]:
                self._note(name, value, other[name])
        for i, value in enumerate(results[0]):
            for others in results[1:]:
                if isinstance(value, torch.Tensor) and i not in layouts:
                    self._note(f"result {i}", value.detach(), others[i].detach())
        self._seen = [{} for _ in range(self.tp)]

    def compare_gradients(self, name: str, gradients: list[torch.Tensor]) -> None:
        """Record the differences between the ranks' gradients of an unsplit weight, or of a replicated input."""
        for other in gradients[1:]:
            self._note(f"gradient of {name}", gradients[0], other)

    def _note(self, name: str, value: torch.Tensor, other: torch.Tensor) -> None:
        """Record the difference between a value on rank 0 and on another rank."""
        if torch.equal(value, other) or (
            (value.isnan() == other.isnan()).all() and torch.equal(value.nan_to_num(), other.nan_to_num())
        ):
            return
        difference = float((value.double() - other.double()).abs().max())
        self.diverging = self.diverging or name
        self.divergence = max(self.divergence, difference)


def simulate(model: nn.Module, tp: int, *, example_inputs: ExampleInputs = None, record: bool = False) -> Simulation:
    """All ``tp`` ranks of ``model`` in lockstep in this process.

    Args:
        model: the dense model. The simulation reads its weights at each call, and adds to their gradients.
        tp: the number of ranks.
        example_inputs: as for :func:`autotp.parallelize`.
        record: whether to compare hidden values between ranks too.

    Example:
        >>> parallel = autotp.simulate(model, tp=4)
        >>> parallel(input_ids=ids).logits  # as model(input_ids=ids).logits
    """
    partition = prepare(model, tp, example_inputs)
    announce(plan_of(partition, tp), partition)
    return Simulation(model, tp, partition, record)
