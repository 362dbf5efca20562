"""Plain arguments that a call changes: tensors that it writes into, lists and dicts that it puts others into."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import autotp
from autotp.verification.measure import relative_error

HEADS, WIDTH, LONGEST = 4, 32, 12


class Attention(nn.Module):
    """Attention on keys and values that it is given to keep, in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv, self.out = how, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, kept: Any) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (p.view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2) for p in parts)
        if self.how == "grown":
            kept.append((k, v)) if not kept else kept.__setitem__(
                0, tuple(torch.cat((old, new), 2) for old, new in zip(kept[0], (k, v), strict=True))
            )
            k, v = kept[0]
        else:
            keys, values = (kept["k"], kept["v"]) if isinstance(kept, dict) else kept
            keys[:, :, places] = k
            values[:, :, places] = v
            k, v, mask = keys, values, mask[places]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[..., -length:, : k.shape[2]])
        return self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))


class Decoder(nn.Module):
    """A decoder written by hand, with caches that the caller makes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.layers = nn.ModuleList(Attention(how) for _ in range(2))
        self.register_buffer("mask", torch.tril(torch.ones(LONGEST, LONGEST, dtype=torch.bool)))

    def forward(self, ids: torch.Tensor, places: torch.Tensor, caches: Any) -> torch.Tensor:
        x = self.words(ids)
        for layer, kept in zip(self.layers, caches, strict=True):
            x = x + layer(x, places, self.mask[: int(places.shape[0])] if layer.how == "grown" else self.mask, kept)  # type: ignore[operator,index]
        return self.head(x)  # type: ignore[no-any-return]


def _zeros() -> torch.Tensor:
    return torch.zeros(2, HEADS, LONGEST, WIDTH // HEADS, dtype=torch.float64)


CACHES: dict[str, Callable[[], Any]] = {
    "lists": lambda: [[_zeros(), _zeros()] for _ in range(2)],
    "tuples": lambda: tuple((_zeros(), _zeros()) for _ in range(2)),
    "dicts": lambda: [{"v": _zeros(), "k": _zeros()} for _ in range(2)],
    "grown": lambda: [[], []],
}


def _made(how: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder("grown" if how == "grown" else "written").double().eval()


def _decoded(model: Any, how: str) -> tuple[list[torch.Tensor], Any]:
    """The logits of a prompt and of some tokens, and what is in the caches at the end."""
    caches, found, at = CACHES[how](), [], 0
    ids = torch.randint(0, 50, (2, LONGEST - 3), generator=torch.Generator().manual_seed(1))
    inside = list(map(id, pytree.tree_leaves(caches)))
    with torch.no_grad():
        for length in (4, 1, 1, 1, 1):
            found.append(model(ids[:, at : at + length], torch.arange(at, at + length), caches))
            at += length
    if how != "grown":
        assert list(map(id, pytree.tree_leaves(caches))) == inside  # the caller's own tensors
    return found, caches


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("how", list(CACHES))
def test_caches_are_what_the_dense_model_leaves_in_them(how: str, tp: int) -> None:
    model = _made(how)
    wanted, caches = _decoded(model, how)
    example = (torch.ones(2, 4, dtype=torch.long), torch.arange(4), CACHES[how]())
    if tp == 1:
        parallel: Any = autotp.parallelize(copy.deepcopy(model), 1, example_inputs=example)
    else:
        parallel = autotp.simulate(model, tp, example_inputs=example)
        assert parallel.partition.is_whole
    found, left = _decoded(parallel, how)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(wanted, found, strict=True))
    pairs = list(zip(pytree.tree_leaves(caches), pytree.tree_leaves(left), strict=True))
    assert len(pairs) == 4
    assert all(relative_error(a, b) < 1e-12 for a, b in pairs)
    assert all(float(a.abs().max()) > 0 for a, _ in pairs)


def test_a_decode_of_growing_length_is_captured_once() -> None:
    model = autotp.parallelize(
        _made("lists"), 1, example_inputs=(torch.ones(2, 4).long(), torch.arange(4), CACHES["lists"]())
    )
    _decoded(model, "lists")
    programs = model.__dict__["_autotp"].cache
    before = programs.captures.count
    _decoded(model, "lists")
    assert programs.captures.count == before
    assert programs.captures.effects.mutated == {2}


class Beside(nn.Module):
    """Does something to what it is given, beside what it returns."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, kept: Any) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)))
        if self.how == "a tensor":
            kept.mul_(2).add_(y)
            return y * kept  # type: ignore[no-any-return]
        if self.how == "append":
            kept.append(y * 2)
        elif self.how == "replace":
            kept[0] = kept[0] + y
        elif self.how == "a new key":
            kept["new"] = y * 3
        elif self.how == "delete":
            del kept["old"]
        return y + sum(v for v in (kept.values() if isinstance(kept, dict) else kept))


def _given(how: str) -> Any:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)
    return {
        "a tensor": lambda: x.clone(), "append": lambda: [x.clone()], "replace": lambda: [x.clone(), x + 1],
        "a new key": lambda: {"old": x.clone()}, "delete": lambda: {"old": x.clone(), "other": x + 2},
    }[how]()  # fmt: skip


HOWS = ["a tensor", "append", "replace", "a new key", "delete"]


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_values_gradients_and_what_is_left(how: str, keyword: bool) -> None:
    """Gradients go through what is left in the argument, as they do in the dense model."""
    torch.manual_seed(0)
    model = Beside(how).double()
    x = torch.randn(3, 8, dtype=torch.float64)

    def example() -> Any:
        return {"x": x, "kept": _given(how)} if keyword else (x, _given(how))

    parallel = autotp.simulate(model, 2, example_inputs=example())
    assert parallel.partition.is_whole
    seen: list[list[torch.Tensor]] = []
    for each in (model, parallel):
        model.zero_grad()
        kept = _given(how)
        given = kept
        result = each(x, kept=kept) if keyword else each(x, kept)
        left = pytree.tree_leaves(given)
        loss = result.square().sum() + sum((t * (i + 2)).sum() for i, t in enumerate(left))
        loss.backward()
        seen.append([result, *left, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(seen[0]) == len(seen[1]) >= 5 + (how != "delete")
    for one, other in zip(*seen, strict=True):
        assert relative_error(one, other) < 1e-12
    if how in ("a new key", "delete"):
        assert list(given) == (["old", "new"] if how == "a new key" else ["other"])


@pytest.mark.parametrize("how", HOWS)
def test_verify_sees_what_is_left_in_arguments(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = Beside(how).double(), (torch.randn(3, 8).double(), _given(how))
    report = autotp.verify(model, 2, example_inputs=example)
    assert report.ok, str(report)
    assert any(n.startswith("args[1]") for n in report.outputs) == (how != "delete"), report.outputs
    monkeypatch.setattr("autotp.capture.output_codegen._Writer.emit_mutation", lambda *_: None)  # strip it, and see
    if how != "delete":
        assert not autotp.verify(model, 2, example_inputs=example).ok


class Moves(nn.Module):
    """Moves values between two tensors that it is given, or tensors between places."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, kept: Any) -> Any:
        y = self.down(torch.relu(self.up(x)))
        if self.how == "swaps values":
            old = kept[0].clone()
            kept[0].copy_(kept[1])
            kept[1].copy_(old)
        elif self.how == "shifts values":
            kept[1].copy_(kept[0])
            kept[0].copy_(y)
        elif self.how == "returns the old value":
            old = kept[0].clone()
            kept[0].mul_(2)
            return y + old, old
        elif self.how == "returns what it wrote":
            return kept[0].add_(y)
        elif self.how == "writes and moves":
            kept[0], kept[1] = kept[1], kept[0]
            kept[0].add_(y)
        elif self.how == "writes and takes out":
            kept.pop(0).mul_(2)
        elif self.how == "an int key":
            kept[len(kept)] = y
        return y


MOVES = ["swaps values", "shifts values", "returns the old value", "returns what it wrote", "writes and moves",
         "writes and takes out", "an int key"]  # fmt: skip


@pytest.mark.filterwarnings("ignore::autotp.PartialCaptureWarning")
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("how", MOVES)
def test_tensors_and_values_that_move(how: str, tp: int) -> None:
    torch.manual_seed(0)
    model = Moves(how).double()

    def given() -> tuple[list[torch.Tensor], Any]:
        own = [torch.full((3, 8), float(i + 1), dtype=torch.float64) for i in range(2)]
        return own, dict(enumerate(own)) if how == "an int key" else list(own)

    example = (torch.ones(3, 8, dtype=torch.float64), given()[1])
    parallel: Any = autotp.simulate(model, 2, example_inputs=example) if tp == 2 else None
    parallel = parallel or autotp.parallelize(copy.deepcopy(model), 1, example_inputs=example)
    seen = []
    for each in (model, parallel):
        own, kept = given()
        with torch.no_grad():
            for n in range(2):
                result = each(torch.full((3, 8), n + 1.0, dtype=torch.float64), kept)
                if how == "returns what it wrote":
                    assert result is kept[0]
                    result.mul_(0.5)
        seen.append([*pytree.tree_leaves(result), *own, *pytree.tree_leaves(kept)])
    assert len(seen[0]) == len(seen[1])
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(*seen, strict=True))


class Two(nn.Module):
    """Changes one of two arguments, and reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, one: Any, other: Any) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)))
        if isinstance(one, list):
            one.append(y)
            return y * len(other)
        one.mul_(2)
        return y * other  # type: ignore[no-any-return]


def test_arguments_that_share_memory_are_told() -> None:
    """A graph would change one of them only."""
    x, whole = torch.ones(3, 8, dtype=torch.float64), torch.ones(6, 8, dtype=torch.float64)
    model = autotp.parallelize(Two().double(), 1, example_inputs=(x, whole[:3].clone(), whole[:3].clone()))
    for _ in range(2):
        for first, one, other in ((x, whole[:3], whole[:3]), (x, whole[:3], whole[2:5]), (x, x, whole[:3])):
            with torch.no_grad(), pytest.raises(autotp.AutoTPError, match="share memory"):
                model(first, one, other)
        with torch.no_grad():
            model(x, whole[:3], whole[3:])
            model(x, whole[::2], whole[1::2])
    model = autotp.parallelize(Two().double(), 1, example_inputs=(x, [x.clone()], [x.clone()]))
    same = [x.clone()]
    with torch.no_grad(), pytest.raises(autotp.AutoTPError, match=r"same list|share memory"):
        model(x, same, same)


class Counts(nn.Module):
    """Counts the tokens that it has seen, from none on, in a dict of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor, state: dict[str, int]) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)))
        state["seen"] = state["seen"] + x.shape[1]
        return y + state["seen"]  # type: ignore[no-any-return]


def test_a_count_of_none_is_no_special_number() -> None:
    torch.manual_seed(0)
    model, x = Counts().double(), torch.randn(2, 4, 64, dtype=torch.float64)
    parallel = autotp.simulate(model, 2, example_inputs=(x, {"seen": 0}))
    states: list[dict[str, int]] = [{"seen": 0}, {"seen": 0}]
    for _ in range(3):
        assert relative_error(model(x, states[0]), parallel(x, states[1])) < 1e-12
        assert states[0] == states[1]
    assert states[0] == {"seen": 12}


class Store:
    def __init__(self, first: torch.Tensor, pair: torch.Tensor) -> None:
        self.first, self.pair = first, (pair,)


class Replaces(nn.Module):
    """Removes one tensor of an object, and puts another tuple in place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor, store: Store) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x))) + store.first
        del store.first
        store.pair = (store.pair[0] + y,)
        return y  # type: ignore[no-any-return]


def test_a_replaced_tuple_is_told_by_its_tensors_not_by_their_numbers() -> None:
    torch.manual_seed(0)
    model, x = Replaces().double(), torch.randn(2, 4, 64, dtype=torch.float64)
    parallel = autotp.simulate(model, 2, example_inputs=(x, Store(x, x)))
    for _ in range(2):
        dense, split = Store(x, x + 1), Store(x, x + 1)
        assert relative_error(model(x, dense), parallel(x, split)) < 1e-12
        assert not hasattr(split, "first")
        assert relative_error(dense.pair[0], split.pair[0]) < 1e-12
