"""Python numbers among the arguments that are others in each call: captured once, and right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autotp
from autotp.verification.measure import relative_error

WIDTH, HEADS, LENGTH, VOCABULARY = 128, 4, 32, 96
SIZE = WIDTH // HEADS


class Attention(nn.Module):
    """As in Meta's reference code: a cache in plain tensors, and the position of the first token as a number."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.cache_k, self.cache_v = (torch.zeros(batch, LENGTH, HEADS, SIZE) for _ in range(2))

    def forward(self, x: torch.Tensor, start: int, turn: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, count, _ = x.shape
        q, k, v = (m(x).view(batch, count, HEADS, SIZE) for m in (self.wq, self.wk, self.wv))
        q, k = q * turn[None, :, None, None], k * turn[None, :, None, None]
        self.cache_k, self.cache_v = self.cache_k.to(q), self.cache_v.to(q)
        self.cache_k[:batch, start : start + count] = k
        self.cache_v[:batch, start : start + count] = v
        k, v = self.cache_k[:batch, : start + count], self.cache_v[:batch, : start + count]
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / SIZE**0.5
        weights = F.softmax(scores if mask is None else scores + mask, -1)
        return self.wo((weights @ v.transpose(1, 2)).transpose(1, 2).reshape(batch, count, -1))  # type: ignore[no-any-return]


class Reference(nn.Module):
    """A decoder of such layers."""

    def __init__(self, batch: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers = nn.ModuleList(Attention(batch) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 300), nn.SiLU(), nn.Linear(300, WIDTH)) for _ in "12")
        self.turns = torch.arange(2 * LENGTH, dtype=torch.float64) / LENGTH + 1
        self.double()

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        count, mask = ids.shape[1], None
        x, turn = self.embedding(ids), self.turns[start : start + count]
        if count > 1:
            mask = torch.triu(torch.full((count, count), float("-inf")), diagonal=1)
            mask = torch.hstack([torch.zeros((count, start)), mask]).type_as(x)
        for layer, mlp in zip(self.layers, self.mlps, strict=True):
            x = x + layer(x, start, turn, mask)
            x = x + mlp(x)
        return self.head(x)  # type: ignore[no-any-return]


def _ids(count: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, count))


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_position_that_moves_is_captured_once(by_keyword: bool) -> None:
    dense = Reference().eval()
    model = copy.deepcopy(dense)
    parallel = autotp.simulate(model, 2, example_inputs=(_ids(5), 0))
    assert parallel.partition.is_whole
    captures = []
    for _ in range(2):
        start = 0
        for count in (5, 1, 1, 1, 1, 3, 1, 4, 1):
            ids = _ids(count)
            expected = dense(ids, start)
            found = parallel(ids, start=start) if by_keyword else parallel(ids, start)
            assert relative_error(expected, found) < 1e-12
            start += count
        captures.append(parallel.cache.captures.count)
    assert captures[1] - captures[0] <= 1, "the second text is captured no more, but for what is now known of the first"
    assert captures[0] <= 7
    for a, b in zip(dense.layers, model.layers, strict=True):
        assert relative_error(a.cache_k, b.cache_k) < 1e-12
    assert {p.name for p in parallel.cache.state.locations.values() if p.sharded} == {
        f"layers.{i}.cache_{n}" for i in range(2) for n in "kv"
    }
    assert [op for _, op in parallel.cache.last.gathered] == ["output"], "the logits; no cache is gathered"


class Branching(nn.Module):
    """What a number does to the Python of a model."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(WIDTH, 320), nn.Linear(320, WIDTH)
        self.double()

    def forward(self, x: torch.Tensor, n: int) -> Any:
        y = self.down(torch.relu(self.up(x)))
        if self.how == "a loop":
            for _ in range(n):
                y = y * 1.1
        elif self.how == "a branch":
            y = y * 2 if n > 4 else y
        elif self.how == "a list":
            y = y * [1, 2, 3, 4, 5, 6, 7, 8][n]
        elif self.how == "a size":
            y = y.unsqueeze(0).expand(n + 1, *y.shape)
        elif self.how == "a factor":
            y = y * n + n / 3
        elif self.how == "returned":
            return y, n + 1
        elif self.how == "text":
            y = y * len(f"{'x' * n}")
        return y


@pytest.mark.parametrize("how", ["a loop", "a branch", "a list", "a size", "a factor", "returned", "text"])
def test_whatever_a_number_is_for(how: str) -> None:
    dense, x = Branching(how), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    parallel = autotp.parallelize(copy.deepcopy(dense), 1, example_inputs=(x, 2))
    for n in (2, 3, 6, 0, 1, 7, 3, 5, 6):
        expected, found = dense(x, n), parallel(x, n)
        if how == "returned":
            assert expected[1] == found[1]
            assert type(found[1]) is int
            expected, found = expected[0], found[0]
        assert relative_error(expected, found) < 1e-12, n
    if how in ("a size", "a factor", "returned"):
        assert parallel.__dict__["_autotp"].cache.captures.count <= 4, "0 and 1 are sizes of their own"


def test_numbers_below_zero_and_others_stay_what_they_are() -> None:
    dense, x = Branching("a factor"), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    parallel = autotp.parallelize(copy.deepcopy(dense), 1, example_inputs=(x, 2))
    for n in (2, 3, -4, -5, 2.5, True, 3, 4):
        assert relative_error(dense(x, n), parallel(x, n)) < 1e-12, n


def test_a_cache_is_written_where_it_is() -> None:
    """A cast to what it is already gives the cache itself; and no step copies it."""
    model = autotp.parallelize(Reference().eval(), 1, example_inputs=(_ids(5), 0))
    start = 5
    model(_ids(5), 0)  # which casts them
    caches = [layer.cache_k for layer in model.layers]
    places = [c.data_ptr() for c in caches]
    for count in (1, 1, 1):
        model(_ids(count), start)
        start += count
    assert all(layer.cache_k is c for layer, c in zip(model.layers, caches, strict=True))
    assert [c.data_ptr() for c in caches] == places
    assert not any(layer.cache_k.requires_grad for layer in model.layers), "forward is in inference mode"
    assert not model(_ids(1), 9).requires_grad
    text = str(autotp.graph(model).lowered(autotp.Lowering(), grad=False))
    assert text.count("write_slice(") == 4
    assert "slice_scatter(" not in text


class Asking(nn.Module):
    """Asks whether an argument is a number, as transformers' models ask of ``logits_to_keep``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 320), nn.Linear(320, WIDTH)
        self.double()

    def forward(self, x: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)))
        return y[:, slice(-keep, None) if isinstance(keep, int) else keep]


def test_python_that_asks_for_a_number_gets_one() -> None:
    dense, x = Asking(), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    parallel = autotp.parallelize(copy.deepcopy(dense), 1, example_inputs=(x, 2))
    for keep in (2, 3, 4, 1, 3, torch.tensor([1, 2])):
        assert relative_error(dense(x, keep), parallel(x, keep)) < 1e-12
