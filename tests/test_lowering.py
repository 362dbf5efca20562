"""Lowered graphs: what they say of their values, each pass's switch, weights that lie side by side."""

from __future__ import annotations

import copy
import dataclasses
import operator
from typing import Any

import pytest
import torch
from torch import fx

import autotp
from autotp.calls import Programs
from autotp.capture import Dense
from autotp.rewrite import RankGraph
from autotp.simulate import Simulation
from autotp.verify import Float64, relative_error
from passes import Lowering
from tests.models import make
from tests.workers import backward, outputs

NAMES = ("gpt", "gpt2", "llama", "neox", "bloom", "bert")
PASSES = [f.name for f in dataclasses.fields(Lowering)]


def programs_of(name: str, tp: int) -> tuple[Any, dict[str, Any], Programs]:
    with Float64():
        model, kwargs = make(name)
        programs = Programs(model, tp, Dense.of(model))
        programs.find((), kwargs)
    return model, kwargs, programs


class _Shapes(fx.Interpreter):
    """Compares what a lowered graph says of each value with what it is."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        said = n.meta.get("local")
        if isinstance(value, torch.Tensor) and said is not None:
            assert value.dtype == said.dtype, (n.format_node(), value.dtype, said)
            sizes = [s for s in said.shape if isinstance(s, int)]
            known = [a for a, s in zip(value.shape, said.shape, strict=True) if isinstance(s, int)]
            assert known == sizes, (n.format_node(), tuple(value.shape), said)
            self.compared = getattr(self, "compared", 0) + 1
        return value


class _Checked(RankGraph):
    """A rank's graph whose lowered graphs run node by node, and are compared."""

    def lowered(self, lowering: Lowering, grad: bool) -> Any:
        found = super().lowered(lowering, grad)
        found.run = _Shapes(found).run
        return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_values_are_as_said(name: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotp.calls.RankGraph", _Checked)
    model, kwargs, programs = programs_of(name, tp)
    with Float64():
        parallel = Simulation(model, tp, programs, lowering=Lowering())
        backward(outputs(parallel(**kwargs)))
        with torch.no_grad():
            parallel(**kwargs)


@pytest.mark.parametrize("off", [*PASSES, "nothing", "everything"])
def test_each_pass_can_be_switched_off(off: str) -> None:
    lowering = Lowering()
    if off != "nothing":
        lowering = Lowering.none() if off == "everything" else dataclasses.replace(lowering, **{off: False})
    model, kwargs, programs = programs_of("llama", 2)
    with Float64():
        expected = outputs(model(**kwargs))
        backward(expected)
        gradients = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        parallel = Simulation(model, 2, programs, lowering=lowering)
        found = outputs(parallel(**kwargs))
        backward(found)
        for a, b in zip(expected, found, strict=True):
            assert relative_error(a, b) < 1e-10
        for n, p in model.named_parameters():
            assert relative_error(gradients[n], p.grad) < 1e-10, n
    found_by = programs.graph(programs.last, 0).lowered(lowering, True).found
    assert off not in found_by
    assert all(found_by[n] for n in ("merge", "together") if getattr(lowering, n) and lowering.merge)


def test_a_pass_that_is_wrong_is_found() -> None:
    """The negative control: two parts of one product change places."""
    model, kwargs, programs = programs_of("llama", 2)
    with Float64(), torch.no_grad():
        expected = outputs(model(**kwargs))
        for rank in (0, 1):
            lowered = programs.graph(programs.last, rank).lowered(Lowering(), False)
            parts = [n for n in lowered.graph.nodes if n.target is operator.getitem]
            same = [n for n in parts if n.meta["local"] == parts[0].meta["local"] and n.args[0] is parts[0].args[0]]
            gate, up = same[:2] if len(same) > 1 else _equal_parts(parts)
            gate.args, up.args = up.args, gate.args
            lowered.recompile()
            lowered.run = lowered.forward
        found = outputs(Simulation(model, 2, programs, lowering=Lowering())(**kwargs))
    assert max(relative_error(a, b) for a, b in zip(expected, found, strict=True)) > 1e-6


def _equal_parts(parts: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    return next(
        (a, b)
        for a in parts
        for b in parts
        if a is not b and a.args[0] is b.args[0] and a.meta["local"] == b.meta["local"]
    )


def test_exact_passes_leave_every_bit() -> None:
    for name in NAMES:
        model, kwargs, programs = programs_of(name, 1)
        with Float64(), torch.no_grad():
            plain = outputs(Simulation(model, 1, programs, lowering=Lowering.none())(**kwargs))
            exact = outputs(Simulation(model, 1, programs, lowering=Lowering().exactly())(**kwargs))
        assert all(torch.equal(a, b) for a, b in zip(plain, exact, strict=True)), name


def test_merged_weights_stay_parameters() -> None:
    """Their names, values, steps, casts and assignments; and copies of the model have their own."""
    with Float64():
        dense, kwargs = make("llama")
        model = autotp.parallelize(copy.deepcopy(dense), 1, example_inputs=kwargs)
        assert list(model.state_dict()) == list(dense.state_dict())
        steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (dense, model)]
        for _ in range(2):
            for m, step in zip((dense, model), steps, strict=True):
                step.zero_grad()
                backward(outputs(m(**kwargs)))
                step.step()
        assert all(relative_error(a, b) < 1e-10 for a, b in zip(dense.parameters(), model.parameters(), strict=True))
        twin = copy.deepcopy(model)
        name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("k_proj.weight"))
        replaced = torch.nn.Parameter(torch.randn_like(weight))
        for m in (dense, model):
            m.get_submodule(name.removesuffix(".weight")).weight = replaced
        with torch.no_grad():
            assert relative_error(outputs(dense(**kwargs))[0], outputs(model(**kwargs))[0]) < 1e-10
            assert relative_error(outputs(model(**kwargs))[0], outputs(twin(**kwargs))[0]) > 1e-6
            dense.get_parameter(name).mul_(2)
            assert relative_error(outputs(dense(**kwargs))[0], outputs(model(**kwargs))[0]) < 1e-10
        for m in (dense, model):
            m.to(torch.float32).to(torch.float64)
        with torch.no_grad():
            assert relative_error(outputs(dense(**kwargs))[0], outputs(model(**kwargs))[0]) < 1e-10
