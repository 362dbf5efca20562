"""compilation: compile a lowered graph with torch.compile, its repeated layers once."""

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
    "size_asserts": False,  # autotp's and torch.compile's guards have checked sizes already
    "reorder_for_peak_memory": False,  # ranks whose shards differ in size need one order of collectives
}
"""Options for torch's own compiler, beside the user's."""


def can_be_compiled(lowered: Lowered) -> bool:
    """Replace collectives by ops that a compiler sees, and return whether the graph can be compiled then."""
    from passes.ops.traceable import traced  # which registers ops: a second's import

    return traced([lowered.graph, *lowered.repeated.values()], context.current())


def can_repeat(graph: fx.Graph, options: Mapping[str, Any]) -> bool:
    """Whether repeated layers may become regions.

    They may not with CUDA graphs if the host takes part in collectives: a CUDA graph can be split at such a collective,
    but not inside a region.

    Args:
        graph: a rank's graph.
        options: options for ``torch.compile``.
    """
    cuda_graphs = options.get("mode") in ("reduce-overhead", "max-autotune")
    cuda_graphs = cuda_graphs or bool((options.get("options") or {}).get("triton.cudagraphs"))
    communicates = any(n.target in COLLECTIVES for n in graph.nodes)
    return not (cuda_graphs and communicates and context.current().group("tp").by_host)


class Region(nn.Module):
    """A subgraph that a graph calls several times with other weights, and that is compiled once."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.program = fx.GraphModule({}, graph)
        self._run = torch.compiler.nested_compile_region(type(self.program).forward)

    def forward(self, *inputs: Any) -> Any:
        """Run the subgraph."""
        return self._run(self.program, *inputs)


def compile_graph(
    module: fx.GraphModule,
    grad: bool,
    options: Mapping[str, Any],
    without_regions: Callable[[], Callable[..., Any]] | None,
) -> Callable[..., Any]:
    """A graph compiled by torch.compile, without a graph break.

    Args:
        module: the graph.
        grad: whether a backward follows.
        options: options for ``torch.compile``.
        without_regions: compiles the same graph without regions; None if it has none.
    """
    # With a backward, strides of dynamic sizes come out as those of the first call (torch 2.13).
    settings = _with_defaults({"dynamic": not grad, **options})
    program = torch.compile(module.forward, fullgraph=True, **settings)
    static = [] if settings["dynamic"] is False else _static_dims(module.graph)

    def run(*inputs: Any) -> Any:
        nonlocal program, without_regions
        # As torch._dynamo.mark_static does, but fast. Without it, sizes that become known in a region fail.
        for i, dims in static:
            inputs[i]._dynamo_static_indices = dims
        try:
            return program(*inputs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # before anything has run
            warnings.warn(
                "a graph was compiled for as many sizes as torch.compile allows, and runs as it is from now on: "
                'pad to fewer sizes, or parallelize(compile={"dynamic": True})',
                stacklevel=2,
            )
            program = module.forward
        except _refusals() as error:  # likewise
            if without_regions is None:
                raise
            warnings.warn(
                f"layers that repeat are compiled each, since torch.compile refuses them as one region: {error}",
                stacklevel=2,
            )
            program, without_regions = without_regions(), None
        return program(*inputs)

    return run


def _refusals() -> tuple[type[Exception], ...]:
    """The errors by which torch.compile refuses a graph."""
    from torch._dynamo import exc

    return exc.Unsupported, exc.UncapturedHigherOrderOpError, exc.InternalTorchDynamoError, exc.BackendCompilerFailed


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``torch.compile``; for torch's own compiler with autotp's options added."""
    if settings.get("backend", "inductor") != "inductor" or ("mode" in settings and "options" in settings):
        return settings
    mode = torch._inductor.list_mode_options(settings.pop("mode", None) or "default", settings["dynamic"])
    return {**settings, "options": {**_OPTIONS, **mode, **(settings.get("options") or {})}}


def _static_dims(graph: fx.Graph) -> list[tuple[int, frozenset[int]]]:
    """The dims of a call's tensors whose sizes the graph knows, with each tensor's position."""
    static = []
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        if (value := node.meta.get("local")) is None or "weights" in node.meta:
            continue
        dims = frozenset(d for d, n in enumerate(value.shape) if isinstance(n, int))
        if any(value.shape[d] > 1 for d in dims):
            static.append((i, dims))
    return static
