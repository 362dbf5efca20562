"""The API around the graph: launching, agreement between ranks, what a parallelized model still is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import autotp
from autotp.verification.measure import relative_error
from tests.end_to_end import ranks
from tests.models import MLP, SmallGPT, TutorialAttention, make, small_gpt
from tests.processes import Ran, results_of


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.api, tmp_path_factory)


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("strict", "PlanError", "kept together by softmax"),
        ("too many ranks", "MismatchError", "torchrun --nproc-per-node 3"),
        ("twice", "AutoTPError", "parallelized already"),
        ("two-dimensional mesh", "MismatchError", "one-dimensional"),
        ("wrong plan", "PlanError", "another model"),
        ("verify after", "AutoTPError", "before autotp.parallelize"),
    ],
)
def test_what_is_wrong_is_an_error_on_every_rank(ran: Any, what: str, kind: str, says: str) -> None:
    for result in ran:
        assert result[what].startswith(kind + ":")
        assert says in result[what]


def test_training_follows_the_dense_model(ran: Any) -> None:
    for result in ran:
        for dense, parallel in result["losses"]:
            assert parallel == pytest.approx(dense, rel=1e-10)
        assert result["losses"][-1][1] < result["losses"][0][1]
        assert result["trained"] < 1e-8


def test_the_model_is_still_itself(ran: Any) -> None:
    for rank, result in enumerate(ran):
        assert result["keys"]
        assert result["tied"]
        assert result["class"]
        assert result["graph"]
        assert result["local"] == ((151, 64), (150, 64))[rank]


@pytest.mark.parametrize("what", ["mesh", "group", "part of it", "tp 1 of 2", "plan"])
def test_groups_and_plans_given(ran: Any, what: str) -> None:
    assert all(result[what] < 1e-10 for result in ran)


def test_no_launcher_is_an_error_that_shows_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(autotp.LaunchError, match="torchrun --nproc-per-node 4"):
        autotp.parallelize(small_gpt(), 4)


def test_tp_1_needs_no_launcher() -> None:
    dense, model = small_gpt(), autotp.parallelize(small_gpt(), 1)
    ids = torch.randint(0, 301, (2, 9))
    assert relative_error(dense(ids), model(ids)) < 1e-12
    assert autotp.full_state_dict(model).keys() == dense.state_dict().keys()


def test_plan_simulate_and_verify_leave_the_model_as_it_was() -> None:
    model, kwargs = make("gpt")
    before = copy.deepcopy(model.state_dict())
    attributes = set(model.__dict__)
    ids = [id(p) for p in model.parameters()]
    autotp.plan(model, 2, example_inputs=kwargs)
    autotp.simulate(model, 2, example_inputs=kwargs)(**kwargs)
    autotp.verify(model, 2, example_inputs=kwargs)
    assert ids == [id(p) for p in model.parameters()]
    assert attributes == set(model.__dict__)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None and p.dtype is torch.float64 for p in model.parameters())


def test_plan_works_on_the_meta_device_and_round_trips(tmp_path: Any) -> None:
    with torch.device("meta"):
        model = SmallGPT()
    plan = autotp.plan(model, 4)
    plan.save(tmp_path / "plan.json")
    assert autotp.Plan.load(tmp_path / "plan.json") == plan
    assert plan.parameters(0) < plan.parameters() / 3
    with pytest.raises(autotp.AutoTPError, match="meta device"):
        autotp.verify(model, 2)


def test_simulation_is_callable_and_differentiable_like_the_model() -> None:
    model, kwargs = make("gpt")
    parallel = autotp.simulate(model, 3, example_inputs=kwargs)
    loss, logits = parallel(**kwargs)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    expected, dense_logits = model(**kwargs)
    expected.backward()
    assert relative_error(dense_logits, logits) < 1e-12
    assert max(relative_error(p.grad, found[n]) for n, p in model.named_parameters()) < 1e-10
    with torch.no_grad():
        assert not parallel(**kwargs)[0].requires_grad


def test_gradients_of_inputs_are_whole() -> None:
    model, kwargs = make("encoder")
    parallel = autotp.simulate(model, 2, example_inputs=kwargs)
    grads = []
    for run in (model, parallel):
        x = kwargs["src"].clone().requires_grad_(True)
        run(src=x).cos().sum().backward()
        grads.append(x.grad)
    assert relative_error(*grads) < 1e-10


class TestGuessedInputs:
    """Without example inputs and dummy inputs, what the first layers suggest is tried."""

    @pytest.mark.parametrize("name", ["tutorial", "encoder", "gpt"])
    def test_guesses(self, name: str) -> None:
        model, _ = make(name)
        assert autotp.plan(model, 2).share_split > 0.9

    def test_nothing_runs(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> torch.Tensor:
                return self.linear(x) + more["y"]

        with pytest.raises(autotp.CaptureError, match="pass example_inputs"):
            autotp.plan(Odd(), 2)

    def test_of_the_wrong_type(self) -> None:
        with pytest.raises(autotp.CaptureError, match=r"tuple \(positional\) or a dict"):
            autotp.plan(make("gpt")[0], 2, example_inputs=3)  # type: ignore[arg-type]


def test_control_flow_on_values_is_an_error_that_says_so() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(autotp.CaptureError, match="depends on the values in a tensor"):
        autotp.plan(Branches(), 2, example_inputs=(torch.randn(2, 3, 8),))


@pytest.mark.parametrize("tp", [0, -1, 2.0])
def test_tp_that_is_no_positive_integer(tp: Any) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        autotp.plan(make("gpt")[0], tp)


def test_names_decide_nothing() -> None:
    """The same network under other names gets the same layouts."""

    class Named(nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            self.names = first, second
            torch.manual_seed(0)
            setattr(self, first, TutorialAttention(64, 4))
            setattr(self, second, MLP(64, 100))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return getattr(self, self.names[1])(getattr(self, self.names[0])(x))

    plans = [
        autotp.plan(Named(*names), 4) for names in (("attn", "mlp"), ("embed_norm", "lm_head"), ("o_proj", "down"))
    ]
    layouts = [[(w.style, dict(w.shards)) for w in p.weights] for p in plans]
    assert layouts[0] == layouts[1] == layouts[2]
