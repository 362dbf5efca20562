"""What a forward keeps on the model: never lost, and no reason to leave a model whole where it changes nothing."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import autotp
from autotp.arguments.snapshot import Snapshot
from autotp.verification.measure import relative_error

WIDTH = 64


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


class Inner(nn.Module):
    """A module whose forward keeps something, in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))
        self.register_buffer("steps", torch.arange(64.0, dtype=torch.float64), persistent=False)
        self.last: Any = None
        self.count, self.ready, self.longest = 0, False, 0
        self.list: list[Any] = []
        self.table: dict[Any, Any] = {}
        self.some: set[int] = set()
        self.queue: deque[Any] = deque(maxlen=3)
        self.plain = torch.zeros(WIDTH, dtype=torch.float64)
        self.state = SimpleNamespace(hidden=None, count=0)
        self.ordered: OrderedDict[str, int] = OrderedDict()
        self.tuple: tuple[list[int]] = ([],)
        self.slotted, self.array, self.counter = Slotted(), np.zeros(2), Counter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)))
        mean = y.detach().mean((0, 1))
        return getattr(self, self.how.replace(" ", "_"))(x, y, mean)  # type: ignore[no-any-return]

    # What makes a later call another one.

    def a_counter(self, x: Any, y: Any, mean: Any) -> Any:
        self.count += 1
        return y * self.count

    def a_counter_for_others(self, x: Any, y: Any, mean: Any) -> Any:
        self.count += 1  # a user may read it afterwards
        return y

    def tokens_seen(self, x: Any, y: Any, mean: Any) -> Any:
        self.count += x.shape[1]
        return y * self.count

    def a_buffer_replaced(self, x: Any, y: Any, mean: Any) -> Any:
        self.mean = self.mean * 0.5 + mean
        return y + self.mean

    def a_buffer_written(self, x: Any, y: Any, mean: Any) -> Any:
        self.mean.mul_(0.5).add_(mean)
        return y + self.mean

    def a_tensor_written(self, x: Any, y: Any, mean: Any) -> Any:
        self.plain.add_(mean)
        return y + self.plain

    def the_last_state(self, x: Any, y: Any, mean: Any) -> Any:
        before, self.last = self.last, mean
        return y if before is None else y + before

    def for_others(self, x: Any, y: Any, mean: Any) -> Any:
        self.last = mean  # a user may read it afterwards
        return y

    def of_weights_for_others(self, x: Any, y: Any, mean: Any) -> Any:
        self.last = self.up.weight.square().sum()
        return y

    def a_list_that_grows(self, x: Any, y: Any, mean: Any) -> Any:
        self.list.append(None)
        return y * len(self.list)

    def a_list_of_states(self, x: Any, y: Any, mean: Any) -> Any:
        self.list.append(mean)
        return y + sum(self.list)

    def a_dict_of_states(self, x: Any, y: Any, mean: Any) -> Any:
        self.table["mean"] = self.table.get("mean", 0) + mean
        return y + self.table["mean"]

    def a_set(self, x: Any, y: Any, mean: Any) -> Any:
        self.some.add(len(self.some))
        return y * len(self.some)

    def a_queue(self, x: Any, y: Any, mean: Any) -> Any:
        self.queue.append(mean)
        return y + self.queue[0]

    def an_object(self, x: Any, y: Any, mean: Any) -> Any:
        self.state.count += 1
        return y * self.state.count

    def a_state_in_an_object(self, x: Any, y: Any, mean: Any) -> Any:
        before, self.state.hidden = self.state.hidden, mean
        return y if before is None else y + before

    def another_way_the_first_time(self, x: Any, y: Any, mean: Any) -> Any:
        first, self.ready = not self.ready, True
        return y * 3 if first else y

    def random_numbers(self, x: Any, y: Any, mean: Any) -> Any:
        if self.last is None:
            self.last = torch.rand(WIDTH, dtype=torch.float64)
        return y * self.last

    def a_number_made_at_first(self, x: Any, y: Any, mean: Any) -> Any:
        if self.last is None:
            self.last = torch.zeros((), dtype=torch.float64)
        self.last = self.last + 1
        return y * self.last

    def another_way_when_it_is_there(self, x: Any, y: Any, mean: Any) -> Any:
        first, self.last = self.last is None, torch.ones(WIDTH, dtype=torch.float64)
        return y * 3 if first else y

    def a_list_of_constants(self, x: Any, y: Any, mean: Any) -> Any:
        self.list.append(torch.ones(1, dtype=torch.float64))
        return y * len(self.list)

    def a_number_beside_a_constant(self, x: Any, y: Any, mean: Any) -> Any:
        self.last = (self.last[0] + 1 if self.last else 1, torch.ones(1))
        return y * self.last[0]

    def an_ordered_dict(self, x: Any, y: Any, mean: Any) -> Any:
        self.ordered["n"] = self.ordered.get("n", 0) + 1
        return y * self.ordered["n"]

    def a_list_in_a_tuple(self, x: Any, y: Any, mean: Any) -> Any:
        self.tuple[0].append(1)
        return y * len(self.tuple[0])

    def an_object_with_slots(self, x: Any, y: Any, mean: Any) -> Any:
        self.slotted.count += 1
        return y * self.slotted.count

    def an_array(self, x: Any, y: Any, mean: Any) -> Any:
        self.array[0] += 1
        return y * float(self.array[0])

    def a_callable(self, x: Any, y: Any, mean: Any) -> Any:
        return y * self.counter()

    def a_mask_of_the_first_size(self, x: Any, y: Any, mean: Any) -> Any:
        if self.last is None:
            self.last = torch.full((64, 1), float(x.shape[1]), dtype=torch.float64)
        return y * self.last[: x.shape[1]]

    def a_mask_of_this_size(self, x: Any, y: Any, mean: Any) -> Any:
        if self.last is None or self.last.shape[0] != x.shape[1]:
            self.last = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=x.dtype))
        return self.last @ y

    # What comes out the same in each call.

    def a_flag(self, x: Any, y: Any, mean: Any) -> Any:
        self.ready = True
        return y

    def a_list_emptied(self, x: Any, y: Any, mean: Any) -> Any:
        self.list = []
        self.list.append(y)
        total = sum(self.list)
        self.list = []
        return total

    def a_size(self, x: Any, y: Any, mean: Any) -> Any:
        self.longest, self.last = x.shape[1], tuple(x.shape)
        return y * self.longest

    def the_size_before(self, x: Any, y: Any, mean: Any) -> Any:
        before, self.longest = self.longest, x.shape[1]
        return y * (before + 1)


ARGUMENTS = [
    "a counter", "a counter for others", "tokens seen", "a buffer replaced", "a buffer written", "a tensor written",
    "the last state", "for others", "of weights for others", "a dict of states", "the size before", "an object",
    "a state in an object", "another way the first time", "random numbers", "a number made at first",
    "another way when it is there", "a number beside a constant", "an ordered dict", "a mask of the first size",
    "a mask of this size",
]  # fmt: skip
PARTS = [
    "a list that grows", "a list of states", "a list of constants", "a list in a tuple", "a set", "a queue",
    "an object with slots", "an array", "a callable",
]  # fmt: skip
STATES = ARGUMENTS + PARTS
FUNCTIONS = ["a flag", "a size", "a list emptied"]


class Outer(nn.Module):
    """A model with such a module, and one that does not keep anything."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.mlp = Inner(how), nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + self.inner(x))  # type: ignore[no-any-return]


def _left(inner: Inner) -> list[Any]:
    values = [inner.mean, inner.plain, inner.last, inner.state.hidden, *inner.list, *inner.queue]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _calls(model: Any) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [model(torch.randn(2, n, WIDTH, dtype=torch.float64)) for n in (4, 4, 6, 4)]


@pytest.mark.parametrize("how", STATES + FUNCTIONS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_call_is_the_dense_models(how: str, ranks: int) -> None:
    """Also what is left for a user to read, where it is a state."""
    dense, x = Outer(how), torch.ones(2, 16, WIDTH, dtype=torch.float64)
    model = copy.deepcopy(dense)
    if how == "random numbers":
        dense.inner.last = model.inner.last = torch.ones(WIDTH, dtype=torch.float64) * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make = autotp.parallelize if ranks == 1 else autotp.simulate
        parallel = make(model, ranks, example_inputs=(x,))
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(_calls(dense), _calls(parallel), strict=True))
    assert ranks == 1 or parallel.divergence == 0.0
    if how in STATES:
        left = _left(dense.inner), _left(model.inner)
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(*left, strict=True))
        assert model.inner.count == dense.inner.count


@pytest.mark.parametrize("how", STATES + FUNCTIONS)
def test_what_cannot_be_an_argument_is_captured_in_parts(how: str) -> None:
    model, x = Outer(how), torch.ones(2, 16, WIDTH, dtype=torch.float64)
    snapshot = Snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = autotp.plan(model, 2, example_inputs=(x,))
    assert bool(plan.graph_breaks) == (how in PARTS), str(plan)
    assert any(w.name == "mlp.0.weight" and w.style == "column" for w in plan.weights), str(plan)
    assert not snapshot.diff()
    if how in PARTS:
        assert "keeps something on the module" in " ".join(s.reason for s in plan.graph_breaks), str(plan)


class Configured(nn.Module):
    """A model that reads a number in an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.config = nn.Linear(4, 4), SimpleNamespace(scale=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.config.scale  # type: ignore[no-any-return]


def test_a_config_that_is_replaced_is_seen() -> None:
    x = torch.ones(1, 4)
    model = autotp.parallelize(Configured(), 1, example_inputs=(x,))
    first = model(x)
    for scale in (3.0, 5.0):
        assert relative_error(first, model(x)) < 1e-6
        model.config = SimpleNamespace(scale=scale)
        assert relative_error(first * scale / 2, model(x)) < 1e-6
        model.config = SimpleNamespace(scale=2.0)


def test_looking_for_parts_leaves_statistics_as_they_are() -> None:
    """The kernel of batch norm writes them without counting it."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(WIDTH)
    before = copy.deepcopy(norm.state_dict())
    model = nn.Sequential(Outer("a counter").float(), nn.Flatten(0, 1), norm).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autotp.plan(model, 2, example_inputs=(torch.randn(2, 16, WIDTH),))
    assert all(torch.equal(before[n], t) for n, t in norm.state_dict().items())
