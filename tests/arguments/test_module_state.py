"""Caches and states that models keep on their own modules: sharded, updated, loaded and saved as parameters are."""

from __future__ import annotations

import copy
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import autotp
from autotp.verification.measure import relative_error
from tests.arguments import ranks
from tests.arguments.ranks import HEADS, LENGTH, WIDTH, Decoder, example, generated, prompt
from tests.processes import Ran, results_of

SIZE = WIDTH // HEADS
CACHES = {  # what rank 0 and rank 1 hold of a layer's keys
    "6 buffers 1": [(1, 3, LENGTH, SIZE)] * 2,
    "6 buffers 3": [(3, 3, LENGTH, SIZE)] * 2,
    "3 buffers 1": [(1, 2, LENGTH, SIZE), (1, 1, LENGTH, SIZE)],
    "1 buffers 1": [(1, 1, LENGTH, SIZE)] * 2,
    "2 tensors 2": [(2, LENGTH, 1, SIZE)] * 2,
    "6 grows 1": [(1, 11, 3, SIZE)] * 2,
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return results_of(2, ranks.everything, tmp_path_factory)


class TestOnProcesses:
    @pytest.mark.parametrize("name", CACHES)
    def test_tokens_are_the_dense_models_and_each_rank_holds_its_share(self, ran: Ran, name: str) -> None:
        for rank, result in enumerate(ran):
            assert result[f"{name}: tokens"]
            assert result[f"{name}: logits"] < 1e-12
            assert result[f"{name}: runs as"] == "GraphRuntime"
            assert result[f"{name}: shape"] == CACHES[name][rank]

    @pytest.mark.parametrize("name", CACHES)
    def test_no_collective_is_for_the_cache(self, ran: Ran, name: str) -> None:
        """Two a layer, one for the embedding where it is split, one for the logits."""
        assert all(result[f"{name}: collectives"] <= 6 for result in ran)

    def test_a_decode_is_captured_once(self, ran: Ran) -> None:
        assert all("2 captures" in result["6 buffers 1: graphs"] for result in ran)

    def test_state_dicts_are_dense_ones_cut(self, ran: Ran) -> None:
        for rank, result in enumerate(ran):
            assert result["state dict"] < 1e-12
            assert result["emptied"]
            assert result["local"] == result["still local"]
            assert set(result["local"].values()) == {CACHES["3 buffers 1"][rank]}
            assert "this rank's shard of it is" in result["wrong shape"]
            assert result["loaded"] < 1e-12

    def test_what_users_do_with_buffers(self, ran: Ran) -> None:
        for rank, result in enumerate(ran):
            assert result["a copy"] < 1e-12
            assert result["the copy's is another"]
            assert result["replaced"] < 1e-12
            assert result["replaced, cut"] == CACHES["3 buffers 1"][rank]
            assert result["emptied in place"] < 1e-12

    def test_a_module_called_by_itself_and_the_whole_share_it(self, ran: Ran) -> None:
        for result in ran:
            assert result["a module by itself"] < 1e-12
            assert result["and then the whole"] < 1e-12

    def test_inference_mode_leaves_nothing_that_cannot_be_written_outside(self, ran: Ran) -> None:
        for result in ran:
            assert result["inference mode"] < 1e-12
            assert result["after inference mode"] < 1e-12

    def test_ranks_that_differ_are_told_what_differs_only(self, ran: Ran) -> None:
        for result in ran:
            assert "values of args[0]" in result["different inputs"]
            assert "cache" not in result["different inputs"], "each holds its own share of that"
            assert result["same on all ranks"]

    def test_whatever_is_kept_steps_are_the_dense_models(self, ran: Ran) -> None:
        for result in ran:
            for how in VARIOUS:
                assert result[how] < 1e-10, how
                assert result[f"{how}: state"] < 1e-10, how

    def test_gradients_pass_from_one_call_to_the_next(self, ran: Ran) -> None:
        for result in ran:
            assert result["losses"] < 1e-12
            assert len(result["gradients"]) == 4
            assert all(e < 1e-12 for e in result["gradients"].values()), result["gradients"]
            assert result["mean"] < 1e-12
            assert result["mean here"] == (160,)
            assert result["last"] < 1e-12, "each rank's share"
            assert result["seen"] < 1e-12, "what is put on a module for others is whole"
            assert result["count"] == (3, 3)


@pytest.mark.parametrize(
    ("how", "processes"), [("buffers", False), ("tensors", False), ("grows", False), ("buffers", True)]
)
def test_verify_compares_what_is_kept(how: str, processes: bool) -> None:
    model = Decoder(3, how)
    before = copy.deepcopy(model.state_dict())
    report = autotp.verify(model, 2, example_inputs=example(), processes=processes)
    assert report.ok, str(report)
    assert {n for n in report.outputs if n.startswith("state.")} == {
        f"state.attentions.{i}.{'cache.' if how == 'buffers' else ''}{n}" for i in range(2) for n in ("keys", "values")
    }
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_verify_sees_a_share_that_is_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    from autotp.arguments import mutations
    from autotp.capture import output_codegen

    def shifted(held: Any, key: Any, new: torch.Tensor) -> None:
        mutations.overwrite(held, key, new.roll(1, 1))

    monkeypatch.setattr(output_codegen, "overwrite", shifted)
    assert not autotp.verify(Decoder(6, "buffers"), 2, example_inputs=example()).ok


@torch.no_grad()
def test_a_cache_is_written_where_it_is() -> None:
    """No step copies it."""
    model = autotp.parallelize(Decoder(3, "buffers").eval(), 1, example_inputs=example())
    keys = model.attentions[1].cache.keys
    place = keys.data_ptr()
    generated(model, prompt(), 5)
    assert model.attentions[1].cache.keys is keys
    assert keys.data_ptr() == place
    assert all("index_put_" in str(g) for g, _ in autotp.graph(model)._bound.values())


class Shared(nn.Module):
    """Keeps a tensor, or a list, that something else on the model is, or is a part of."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.how = nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH), how
        self.register_buffer("whole", torch.zeros(2, WIDTH))
        self.double()
        self.part = self.whole[0]
        self.same: Any = self.whole
        self.list = [torch.zeros(WIDTH).double()]
        self.other = types.SimpleNamespace(list=self.list)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.detach().mean((0, 1))
        if self.how == "a view":
            self.part.add_(mean)
            x = x + self.whole.sum(0)
        elif self.how == "two names":
            self.whole[0] = mean + self.whole[0]
            x = x + self.same.sum(0)
        elif self.how == "a list in two places":
            self.list[0] = self.list[0] + mean
            x = x + self.other.list[0]
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["a view", "two names", "a list in two places"])
def test_what_is_shared_on_the_model_is_captured_in_parts_and_right(how: str) -> None:
    dense, x = Shared(how), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    model = Shared(how)
    with pytest.warns(autotp.PartialCaptureWarning):
        parallel = autotp.simulate(model, 2, example_inputs=(x,))
    for _ in range(3):
        assert relative_error(dense(x), parallel(x)) < 1e-12


class Various(nn.Module):
    """Ways to keep something that are easily got wrong."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.up, self.down = how, nn.Linear(WIDTH, 320), nn.Linear(320, WIDTH)
        self.register_buffer("mean", torch.zeros(320))
        self.double()
        self.plain, self.last, self.other = torch.zeros((), dtype=torch.float64), None, None
        self.inside = {"count": [torch.zeros((), dtype=torch.float64)]}

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.tanh(self.up(x))
        if self.how == "a tensor that counts":
            self.plain += 1  # of nothing that comes in
            self.inside["count"][0].add_(self.plain)
            y = y * self.plain + self.inside["count"][0]
        elif self.how == "the input":
            before, self.last = self.last, x
            y = y if before is None else y + before.mean()
        elif self.how == "returned":
            self.mean.add_(y.detach().mean((0, 1)))
            return self.down(y), self.mean
        elif self.how == "a parameter's values":
            if self.last is None:
                self.last = self.up.weight.detach()
            y = y + self.last.mean(1)
        elif self.how == "a part of a parameter":
            self.last = self.up.weight[0]
            y = y + self.last.sum()
        elif self.how == "a view of another":
            self.last = y.detach().mean(0)
            self.other = self.last[0]
        elif self.how == "another shape":
            self.last = y.mean((0, 1)) if x.shape[1] < 4 else y.mean(0)
            self.other = self.last if self.other is None else self.other + self.last.sum()
        return self.down(y)


VARIOUS = ["a tensor that counts", "the input", "returned", "a parameter's values", "a part of a parameter",
           "a view of another", "another shape"]  # fmt: skip


def _stepped(model: nn.Module, parameters: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """A call, a backward and an optimizer's step, twice on one input."""
    found, optimizer = [], torch.optim.SGD(parameters, lr=0.1)
    for given in (x, x, x[:, :3], x[:, :3], x):
        result = model(given)
        found += [r.detach().clone() for r in (result if isinstance(result, tuple) else (result,))]
        optimizer.zero_grad()
        (result[0] if isinstance(result, tuple) else result).square().mean().backward()
        optimizer.step()
    return found


@pytest.mark.parametrize("how", VARIOUS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_whatever_is_kept_calls_are_the_dense_models(how: str, ranks: int) -> None:
    dense, x = Various(how), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    model = Various(how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autotp.plan(model, 2, example_inputs=(x,))
        assert float(model.plain) == 0 == float(model.inside["count"][0]), "planning leaves the model as it was"
        parallel = (
            autotp.parallelize(model, 1, example_inputs=(x,))
            if ranks == 1
            else autotp.simulate(model, ranks, example_inputs=(x,))
        )
    expected, found = _stepped(dense, dense.parameters(), x), _stepped(parallel, model.parameters(), x)
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(expected, found, strict=True))
    assert float(dense.plain) == float(model.plain)
    assert relative_error(dense.mean, model.mean) < 1e-10


def test_a_buffer_that_becomes_another_name_of_one_is_told() -> None:
    model = Various("returned")
    model.register_buffer("spare", torch.zeros(320, dtype=torch.float64))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    autotp.parallelize(model, 1, example_inputs=(x,))
    model(x)
    model.mean = model.spare
    with pytest.raises(autotp.AutoTPError, match="shares memory with another tensor on the model"):
        model(x)


class Keeping(nn.Module):
    """Keeps the object that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH)
        self.kept: Any = None

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        self.kept = cache
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def test_an_argument_that_is_kept_stays_the_callers() -> None:
    model, cache = Keeping(), types.SimpleNamespace(keys=torch.ones(2))
    with pytest.warns(autotp.PartialCaptureWarning, match="keeps an argument on the model"):
        autotp.parallelize(model, 1, example_inputs=(torch.ones(1, 2, WIDTH), cache))
    model(torch.ones(1, 2, WIDTH), cache)
    assert model.kept is cache


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, lambda n: nn.InstanceNorm1d(n, track_running_stats=True)])
def test_statistics_that_a_kernel_writes_unsaid_are_never_lost(norm: Any) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 5), norm(7), nn.Linear(5, 6)).double().train()
    model = copy.deepcopy(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", autotp.PartialCaptureWarning)
        parallel = autotp.simulate(model, 2, example_inputs=(torch.randn(4, 7, 6, dtype=torch.float64),))
    for _ in range(3):
        x = torch.randn(4, 7, 6, dtype=torch.float64)
        assert relative_error(dense(x), parallel(x)) < 1e-12
    pairs = zip(dense.buffers(), model.buffers(), strict=True)
    assert all(relative_error(a.double(), b.double()) < 1e-12 for a, b in pairs)


def test_planning_leaves_no_gradient_in_a_buffer() -> None:
    """Watching a model to find its parts writes caches with what needs gradients."""
    model = Shared("a view")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autotp.plan(model, 2, example_inputs=(torch.ones(1, 2, WIDTH, dtype=torch.float64),))
    assert not any(b.requires_grad for b in model.buffers())
