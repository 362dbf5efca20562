"""compiled: a lowered graph under torch.compile, what it repeats once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from passes import Lowered
from passes.ops import context
from passes.ops.registry import COLLECTIVES

__all__ = ["Region", "can_be_compiled", "can_repeat", "compile_graph"]

_OPTIONS = {
    "size_asserts": False,  # calls are recognised, and torch.compile's guards say it again
    "reorder_for_peak_memory": False,  # ranks whose shards differ in size must meet in one order
}
"""Options for torch's own compiler, beside the user's."""


def can_be_compiled(made: Lowered) -> bool:
    """Let ranks meet through ops that a compiler sees; whether a graph can be compiled then."""
    from passes.ops.traceable import traced  # which registers ops: a second's import

    return traced([made.graph, *made.repeated.values()], context.current())


def can_repeat(graph: fx.Graph, options: Mapping[str, Any]) -> bool:
    """Whether regions may hold what ranks meet in: a CUDA graph is cut where the host takes part, but in no region.

    Args:
        graph: a rank's graph.
        options: for ``torch.compile``.
    """
    graphs = options.get("mode") in ("reduce-overhead", "max-autotune")
    graphs = graphs or bool((options.get("options") or {}).get("triton.cudagraphs"))
    return not (graphs and any(n.target in COLLECTIVES for n in graph.nodes) and context.current().group("tp").by_host)


class Region(nn.Module):
    """What a graph calls several times, with other weights, and a compiler compiles once."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.program = fx.GraphModule({}, graph)
        self._run = torch.compiler.nested_compile_region(type(self.program).forward)

    def forward(self, *given: Any) -> Any:
        """Run it."""
        return self._run(self.program, *given)


def compile_graph(
    module: fx.GraphModule, grad: bool, options: Mapping[str, Any], without: Callable[[], Callable[..., Any]] | None
) -> Callable[..., Any]:
    """A graph as torch.compile makes it, whole.

    Args:
        module: the graph.
        grad: whether a backward follows.
        options: for ``torch.compile``.
        without: makes the same without regions, if there are any.
    """
    # With a backward, strides of dynamic sizes come out as those of the first call (torch 2.13).
    given = _with_defaults({"dynamic": not grad, **options})
    now = torch.compile(module.forward, fullgraph=True, **given)
    fixed = [] if given["dynamic"] is False else _fixed(module.graph)

    def run(*inputs: Any) -> Any:
        nonlocal now, without
        for i, dims in fixed:  # as torch._dynamo.mark_static does, but fast: sizes that become known in a region fail
            inputs[i]._dynamo_static_indices = dims
        try:
            return now(*inputs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # before anything has run
            warnings.warn(
                "a graph was compiled for as many sizes as torch.compile allows, and runs as it is from now on: "
                'pad to fewer sizes, or parallelize(compile={"dynamic": True})',
                stacklevel=2,
            )
            now = module.forward
        except _refusals() as error:  # likewise
            if without is None:
                raise
            warnings.warn(
                f"layers that repeat are compiled each, since torch.compile refuses them as one region: {error}",
                stacklevel=2,
            )
            now, without = without(), None
        return now(*inputs)

    return run


def _refusals() -> tuple[type[Exception], ...]:
    from torch._dynamo import exc

    return exc.Unsupported, exc.UncapturedHigherOrderOpError, exc.InternalTorchDynamoError, exc.BackendCompilerFailed


def _with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Options for ``torch.compile`` with autotp's own, where they are for torch's own compiler."""
    if given.get("backend", "inductor") != "inductor" or ("mode" in given and "options" in given):
        return given
    mode = torch._inductor.list_mode_options(given.pop("mode", None) or "default", given["dynamic"])
    return {**given, "options": {**_OPTIONS, **mode, **(given.get("options") or {})}}


def _fixed(graph: fx.Graph) -> list[tuple[int, frozenset[int]]]:
    """For each of the call's tensors that has dims of which a graph knows the size, its position and these dims."""
    found = []
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        if (value := node.meta.get("local")) is None or "weights" in node.meta:
            continue
        dims = frozenset(d for d, n in enumerate(value.shape) if isinstance(n, int))
        if any(value.shape[d] > 1 for d in dims):
            found.append((i, dims))
    return found
