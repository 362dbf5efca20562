"""Traps that a review found: each was wrong, or crashed, before it was a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autotp
from autotp.verification.measure import relative_error
from tests.models import SmallGPT


class Net(nn.Module):
    """An MLP around whose hidden values, or results, something happens."""

    def __init__(self, between: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None, **more: Any):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.between, self.after = between, after
        for name, parameter in more.items():
            self.register_parameter(name, nn.Parameter(parameter))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.up(x))
        y = self.down(self.between(self, h) if self.between else h)
        return self.after(self, x, h, y) if self.after else y


def _no_grad_regions(net: Net, x: torch.Tensor, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        a = torch.sin(x) * 2
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        b = torch.cos(x) * 3
    return y * a + b


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "a weight with leading dims of size one": lambda: Net(lambda s, h: h * s.g, g=torch.randn(1, 1, 128)),
    "a weight with a trailing dim of size one": lambda: Net(lambda s, h: h * s.g.T, g=torch.randn(128, 1)),
    "two no-grad regions with regions inside": lambda: Net(after=_no_grad_regions),
    "a reduction of a value that cannot be split": lambda: Net(
        after=lambda s, x, h, y: y + (h.unsqueeze(-1) * h.unsqueeze(-2)).sum(-1).sum(-1, keepdim=True)
    ),
    "a variance over all dims": lambda: Net(after=lambda s, x, h, y: y * h.var(unbiased=False)),
    "type_as of a value of another rank": lambda: Net(lambda s, h: h * torch.ones(128).type_as(h)),
    "gradients scaled by frequency": lambda: nn.Sequential(
        nn.Embedding(4000, 64, scale_grad_by_freq=True), nn.Linear(64, 4000)
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_equal_to_dense(name: str) -> None:
    torch.manual_seed(0)
    model = TRAPS[name]()
    inputs = torch.randint(0, 9, (3, 5)) if "frequency" in name else torch.randn(3, 5, 64)
    report = autotp.verify(model, 2, example_inputs=(inputs,))
    assert report.ok, str(report)


def test_a_branch_on_sizes_is_taken_anew() -> None:
    class Branches(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y * 10 if x.shape[1] > 8 or x.shape[1] % 4 == 3 else y

    model = Branches().double()
    parallel = autotp.simulate(model, 2, example_inputs=(torch.randn(3, 5, 64).double(),))
    for length in (5, 12, 7, 6):
        x = torch.randn(2, length, 64).double()
        assert relative_error(model(x), parallel(x)) < 1e-12
    assert parallel.cache.captures.count == 3, "6 runs on the graph captured at 5"


def test_grouped_query_heads_are_split_at_batch_one_too() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8, intermediate_size=2816
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    inputs = {"input_ids": torch.zeros(1, 512, dtype=torch.long), "use_cache": False, "logits_to_keep": 1}
    plan = autotp.plan(model, 2, example_inputs=inputs)
    assert plan.count("forward") == 6
    styles = {w.name.rsplit(".", 2)[-2]: w.style for w in plan.weights if w.shards}
    assert styles["k_proj"] == styles["q_proj"] == styles["gate_proj"] == "column"


def test_hooks_and_forwards_of_the_models_own() -> None:
    model = Net().double()
    x = torch.randn(2, 5, 64).double()
    model.register_forward_hook(lambda module, args, output: output * 2)
    original = model.forward
    model.forward = lambda x: original(x) + 100  # type: ignore[method-assign]
    expected = [model(x), model(x[:1])]
    autotp.parallelize(model, 1, example_inputs=(x,))
    for own, value in zip((x, x[:1]), expected, strict=True):  # the second is another structure
        assert relative_error(value, model(own)) < 1e-12


def test_a_module_under_two_names_keeps_its_weights() -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.ModuleList([self.up, self.down])

    model = Twice()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for example in (None, (torch.randn(2, 5, 64),)):
        assert autotp.plan(model, 2, example_inputs=example).share_split == 1.0
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_size_that_python_turns_into_a_constant_makes_another_graph() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.linear = nn.Embedding(50, 64), nn.Linear(64, 64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            places = torch.tensor(list(range(ids.shape[1]))).repeat(ids.shape[0], 1)
            return self.linear(self.embed(ids)) * places.unsqueeze(-1)

    dense, model = Counts(), autotp.parallelize(Counts(), 1, example_inputs=(torch.zeros(2, 8, dtype=torch.long),))
    for length in (8, 9, 12, 8):
        ids = torch.randint(0, 50, (3, length))
        assert relative_error(dense(ids), model(ids)) < 1e-6
    assert model.__dict__["_autotp"].cache.captures.count == 3


def _parallelized_alone(model: nn.Module, *args: torch.Tensor) -> nn.Module:
    """Rank 0 of two, without the other."""
    from autotp.capture.captured_graph import DenseShapes
    from autotp.distributed.agreement import Agreement
    from autotp.distributed.mesh import Mesh
    from autotp.distributed.process_context import ProcessContext
    from autotp.runtime.graph_cache import GraphCache
    from autotp.runtime.graph_runtime import GraphRuntime

    programs = GraphCache(model, 2, DenseShapes.of(model))
    programs.bind(args, {})
    agreement = Agreement(Mesh(0, 2, None), type(model).__name__)
    context = ProcessContext(agreement.mesh, 0, agreement.missing)
    GraphRuntime(model, programs, agreement, context).attach()
    return model


def test_a_submodule_that_holds_shards_never_runs_its_own_forward() -> None:
    model = _parallelized_alone(SmallGPT(), torch.zeros(2, 8, dtype=torch.long))
    model.ln_f(torch.zeros(2, 64))  # whole, and so as it was
    with pytest.raises(autotp.AutoTPError, match=r"\(wte\) has not been called by itself"):
        autotp.graph(model.wte)
    ids = torch.zeros(2, 8, dtype=torch.long)
    ours = model.wte.forward
    for forward in (lambda x: x, type(model.wte).forward.__get__(model.wte)):
        model.wte.forward = forward
        with pytest.raises(autotp.AutoTPError, match="wte holds only this rank's shards"):
            model.wte(ids)
        with pytest.raises(autotp.AutoTPError, match="wte got or lost a forward of its own"):
            model(ids)
    model.wte.forward = ours
    del model.wte.forward
    with pytest.raises(autotp.AutoTPError, match="wte holds only this rank's shards"):
        model.wte(ids)
    with pytest.raises(autotp.AutoTPError, match="this rank holds"):  # the weights were not cut here
        model(ids)
    assert isinstance(model.wte.forward, type(ours)), "there again"


def test_double_backward_is_an_error_and_not_wrong() -> None:
    model = Net(after=lambda s, x, h, y: h.sort(-1).values)
    parallel = autotp.simulate(model, 2, example_inputs=(torch.randn(2, 5, 64),))
    x = torch.randn(2, 5, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(parallel(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("call", [autotp.plan, autotp.simulate, autotp.verify])
@pytest.mark.parametrize("tp", [0, 64])
def test_tp_out_of_range(call: Any, tp: int) -> None:
    with pytest.raises(ValueError, match="62 at most"):
        call(Net(), tp, example_inputs=(torch.randn(2, 5, 64),))
