"""Compiled graphs on real processes."""

from __future__ import annotations

from typing import Any

import torch

import autotp
from autotp.verify import Float64, relative_error
from tests.models import make
from tests.workers import backward, outputs


def compiled(rank: int, world: int) -> dict[str, Any]:
    """A compiled model against the dense one; traced as ever, but with no code generated, which takes minutes."""
    results: dict[str, Any] = {}
    for how in ("argument",):
        traced: list[Any] = []

        def backend(graph: Any, inputs: Any, traced: list[Any] = traced) -> Any:
            traced.append(graph)
            from torch._dynamo.backends.debugging import aot_eager

            return aot_eager(graph, inputs)

        torch._dynamo.reset()
        with Float64():
            dense, kwargs = make("llama")
            model, _ = make("llama")
            autotp.parallelize(model, world, example_inputs=kwargs, compile={"backend": backend})
            error, differing = 0.0, 0.0
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
                    differing = max(differing, relative_error(p.grad, gradients[n]))
        collectives = sum("all_reduce" in str(n.target) for g in traced for n in g.graph.nodes)
        results[how] = {"outputs": error, "gradients": differing, "traced": len(traced), "collectives": collectives}
    return results
