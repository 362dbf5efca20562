"""Compiled graphs on real processes."""

from __future__ import annotations

from typing import Any

import torch

import autotp
from autotp.verification.measure import Float64, relative_error
from tests.comparison import backward, outputs
from tests.models import make


def compiled(rank: int, world: int) -> dict[str, Any]:
    """A compiled model against the dense one: traced as ever, but with no code generated, which takes minutes; and
    without a backward as ``torch.compile`` of a parallelized model does it, with code."""
    return {"argument": _traced(world), "torch.compile": _whole(world)}


def _traced(world: int) -> dict[str, Any]:
    from torch._dynamo.backends.debugging import aot_eager

    traced: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return aot_eager(graph, inputs)

    with Float64():
        dense, kwargs = make("llama")
        model, _ = make("llama")
        autotp.parallelize(model, world, example_inputs=kwargs, compile={"backend": backend})
        error, differing = 0.0, dict[str, float]()
        for length in (9, 12):
            _, own = make("llama", 2, length, seed=length)
            dense.zero_grad()
            model.zero_grad()
            expected, found = outputs(dense(**own)), outputs(model(**own))
            error = max(error, *(relative_error(a, b) for a, b in zip(expected, found, strict=True)))
            backward(expected)
            backward(found)
            gradients = autotp.full_gradients(model)
            for n, p in dense.named_parameters():
                differing[n] = max(differing.get(n, 0.0), relative_error(p.grad, gradients[n]))
    hop = torch.ops.higher_order.invoke_subgraph
    every = [m for g in traced for m in g.modules() if isinstance(m, torch.fx.GraphModule)]
    return {
        "outputs": error,
        "gradients": differing,
        "graphs": len(traced),
        "calls": sum(n.target is hop for g in traced for n in g.graph.nodes),
        "collectives": sum("all_reduce" in str(n.target) for m in every for n in m.graph.nodes),
    }


def _whole(world: int) -> dict[str, Any]:
    torch._dynamo.reset()
    with Float64(), torch.no_grad():
        dense, kwargs = make("gpt")
        model, _ = make("gpt")
        autotp.parallelize(model, world, example_inputs=kwargs)
        call = torch.compile(model)
        pairs = [(outputs(dense(**own)), outputs(call(**own))) for own in (kwargs, make("gpt", 3, 11, seed=1)[1])]
        graphs = model.__dict__["_autotp"].cache._graphs.values()
        bound = [lowered for g in graphs for (_, is_compiled), (lowered, _) in g._bound.items() if is_compiled]
    return {
        "outputs": max(relative_error(a, b) for e, f in pairs for a, b in zip(e, f, strict=True)),
        "graphs": len(bound),
        "calls": sum(n.target in g.repeated for g in bound for n in g.graph.nodes),
    }
