"""The public functions: launching, training, given groups and plans, and what a parallelized model still is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import autotp
from autotp.verification.measure import relative_error
from tests.end_to_end import ranks
from tests.models import make, small_gpt
from tests.modules.test_model_checks import X, mlp
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


@pytest.mark.parametrize("tp", [0, -1, 2.0])
def test_tp_that_is_no_positive_integer(tp: Any) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        autotp.plan(make("gpt")[0], tp)


def test_a_parallelized_model_of_one_rank_can_be_copied() -> None:
    model = autotp.parallelize(mlp(), 1, example_inputs=(X,))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert not torch.equal(model(X), twin(X))
    assert torch.allclose(twin(X), mlp()(X), atol=1e-6)
