"""Tracers and transforms of others refuse a parallelized model by name; they take the dense one."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import autotp
from tests.models import MLP

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return MLP(16, 32)


@pytest.fixture(scope="module")
def parallel() -> nn.Module:
    return autotp.parallelize(dense(), 1, example_inputs=(X,))


def dual(m: nn.Module) -> Any:
    with forward_ad.dual_level():
        return m(forward_ad.make_dual(X, X))


def fake(m: nn.Module) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return m(mode.from_tensor(X))


TRACERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "grad": (lambda m: torch.func.grad(lambda x: m(x).sum())(X), "torch.func transforms"),
    "grad of parameters": (
        lambda m: torch.func.grad(lambda p: functional_call(m, p, (X,)).sum())(dict(m.named_parameters())),
        "torch.func transforms",
    ),
    "vmap": (lambda m: torch.func.vmap(m)(X), "torch.func transforms"),
    "jvp": (lambda m: torch.func.jvp(m, (X,), (X,)), "torch.func transforms"),
    "jacrev": (lambda m: torch.func.jacrev(m)(X[0]), "torch.func transforms"),
    "forward AD": (dual, "forward-mode differentiation"),
    "jit.trace": (lambda m: torch.jit.trace(m, (X,)), "torch.jit.trace"),
    "jit.script": (torch.jit.script, "torch.jit.script"),
    "export": (lambda m: torch.export.export(m, (X,)), r"torch\.export"),
    "make_fx": (lambda m: make_fx(m)(X), "make_fx"),
    "fake tensors": (fake, "FakeTensorMode"),
}


@pytest.mark.parametrize("name", TRACERS)
def test_the_error_names_the_tracer(parallel: nn.Module, name: str) -> None:
    trace, said = TRACERS[name]
    trace(dense())
    with pytest.raises(autotp.AutoTPError, match=said):
        trace(parallel)
    torch.testing.assert_close(parallel(X), dense()(X))


def test_onnx_is_refused_where_it_traces(parallel: nn.Module) -> None:
    with pytest.raises(autotp.AutoTPError, match=r"torch\.onnx\.export"):
        torch.onnx.export(parallel, (X,), io.BytesIO(), dynamo=False)


def test_submodules_are_refused_too(parallel: nn.Module) -> None:
    stacked = nn.Sequential(parallel, nn.Tanh())
    with pytest.raises(autotp.AutoTPError, match=r"torch\.jit\.script"):
        torch.jit.script(stacked)
    with pytest.raises(autotp.AutoTPError, match=r"torch\.export"):
        torch.export.export(stacked, (X,))


def test_modes_that_only_watch_are_no_tracers(parallel: nn.Module) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        ops = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Watching.ops += 1
            return func(*args, **(kwargs or {}))

    with Watching():
        torch.testing.assert_close(parallel(X), dense()(X))
    assert Watching.ops


def test_torch_compile_still_runs(parallel: nn.Module) -> None:
    torch.testing.assert_close(torch.compile(parallel, backend="eager")(X), dense()(X))
