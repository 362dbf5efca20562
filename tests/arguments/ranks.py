"""Models that keep their caches and states on their own modules, on real processes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import autotp
from autotp.verification.measure import relative_error
from tests.comparison import apart, raised, same

Result = dict[str, Any]
WIDTH, HEADS, LENGTH, VOCABULARY = 128, 6, 16, 96


class Cache(nn.Module):
    """Keys and values in buffers, as gpt-fast has them."""

    def __init__(self, batch: int, heads: int, size: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(batch, heads, LENGTH, size))
        self.register_buffer("values", torch.zeros(batch, heads, LENGTH, size))

    def update(self, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[:, :, at] = keys
        self.values[:, :, at] = values
        return self.keys, self.values


class Attention(nn.Module):
    """Grouped queries over a cache of the module's own.

    Args:
        kv: the number of key-value heads.
        how: ``buffers``: a module of buffers; ``tensors``: plain tensors, written in place; ``grows``: plain tensors
            that are joined to others.
        batch: the batch size that the cache is for.
    """

    def __init__(self, kv: int, how: str, batch: int) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.kv, self.how, self.size = kv, how, size
        self.q, self.o = nn.Linear(WIDTH, HEADS * size), nn.Linear(HEADS * size, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv * size), nn.Linear(WIDTH, kv * size)
        if how == "buffers":
            self.cache = Cache(batch, kv, size)
        self.keys = self.values = torch.zeros(batch, LENGTH, kv, size).double() if how == "tensors" else None
        if how == "tensors":
            self.values = torch.zeros_like(self.keys)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (HEADS, self.size)).transpose(1, 2)
        k, v = (m(x).unflatten(-1, (self.kv, self.size)) for m in (self.k, self.v))
        if self.how == "buffers":
            k, v = self.cache.update(at, k.transpose(1, 2), v.transpose(1, 2))
        elif self.how == "tensors":
            self.keys[: x.shape[0], at], self.values[: x.shape[0], at] = k, v
            k, v = self.keys[: x.shape[0]].transpose(1, 2), self.values[: x.shape[0]].transpose(1, 2)
        else:
            self.keys = k if self.keys is None else torch.cat([self.keys, k], 1)
            self.values = v if self.values is None else torch.cat([self.values, v], 1)
            k, v, mask = self.keys.transpose(1, 2), self.values.transpose(1, 2), mask[..., : self.keys.shape[1]]
        k, v = (t.repeat_interleave(HEADS // self.kv, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A decoder that keeps its own cache, and is told which positions it is given."""

    def __init__(self, kv: int, how: str, batch: int = 1, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attentions = nn.ModuleList(Attention(kv, how, batch) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 300), nn.SiLU(), nn.Linear(300, WIDTH)) for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool)), persistent=False)
        self.double()

    def forward(self, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        x, mask = self.embedding(ids), self.mask[None, None, at]
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x), mask, at)
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x)  # type: ignore[no-any-return]


def example(batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(4).expand(batch, 4) % VOCABULARY, torch.arange(4)


@torch.no_grad()
def generated(model: Any, prompt: torch.Tensor, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens, greedily, and the logits of each step."""
    ids, logits, at = prompt, [model(prompt, torch.arange(prompt.shape[1]))], prompt.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, logits[-1][:, -1:].argmax(-1)], 1)
        logits.append(model(ids[:, -1:], torch.tensor([at])))
        at += 1
    return ids, logits


def prompt(batch: int = 1, length: int = 5) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def _made(kv: int, how: str, batch: int, world: int = 2) -> tuple[Decoder, Decoder]:
    dense = Decoder(kv, how, batch).eval()
    model = copy.deepcopy(dense)
    return dense, autotp.parallelize(model, world, example_inputs=example(batch))


def caches(rank: int, world: int) -> Result:
    """Each kind of cache, key-value heads that divide, do not, and are fewer than ranks."""
    result: Result = {}
    for kv, how, batch in [(6, "buffers", 1), (6, "buffers", 3), (3, "buffers", 1), (1, "buffers", 1),
                           (2, "tensors", 2), (6, "grows", 1)]:  # fmt: skip
        name = f"{kv} {how} {batch}"
        dense, model = _made(kv, how, batch)
        expected, found = (generated(m, prompt(batch), 6) for m in (dense, model))
        result[f"{name}: tokens"] = torch.equal(expected[0], found[0])
        result[f"{name}: logits"] = max(relative_error(a, b) for a, b in zip(expected[1], found[1], strict=True))
        result[f"{name}: graphs"] = autotp.graph(model).note
        where = model.attentions[1].cache if how == "buffers" else model.attentions[1]
        result[f"{name}: shape"] = tuple(where.keys.shape)
        result[f"{name}: runs as"] = type(model.__dict__["_autotp"]).__name__
        with autotp.Tally() as tally, torch.no_grad():
            model(prompt(batch, 1), torch.tensor([12]))
        result[f"{name}: collectives"] = sum(tally.calls.values())
    return result


def use(rank: int, world: int) -> Result:
    """What users do with a model that keeps its own cache."""
    result: Result = {}
    dense, model = _made(3, "buffers", 1)
    generated(dense, prompt(), 3), generated(model, prompt(), 3)
    full = autotp.full_state_dict(model)
    result["state dict"] = max(relative_error(t, full[n]) for n, t in dense.state_dict().items())
    result["local"] = {n: tuple(t.shape) for n, t in model.state_dict().items() if "cache" in n}
    model.load_state_dict(Decoder(3, "buffers").state_dict())
    result["emptied"] = all(float(b.abs().max()) == 0 for n, b in model.named_buffers() if "cache" in n)
    result["still local"] = {n: tuple(t.shape) for n, t in model.state_dict().items() if "cache" in n}
    wrong = {n: t[..., :3] if "keys" in n else t for n, t in dense.state_dict().items()}
    result["wrong shape"] = raised(lambda: model.load_state_dict(wrong))
    model.load_state_dict(dense.state_dict())
    at = torch.tensor([9])
    with torch.no_grad():
        result["loaded"] = apart(dense, model, ids=prompt(length=1), at=at)
        copied = copy.deepcopy(model)
        result["a copy"] = relative_error(dense(prompt(length=1), at + 1), copied(prompt(length=1), at + 1))
        result["the copy's is another"] = not torch.equal(
            copied.attentions[0].cache.keys, model.attentions[0].cache.keys
        )
        model.attentions[0].cache.keys = torch.ones_like(dense.attentions[0].cache.keys)  # whole, and replaced
        dense.attentions[0].cache.keys = torch.ones_like(dense.attentions[0].cache.keys)
        dense(prompt(length=1), at + 1), model(prompt(length=1), at + 1)
        result["replaced"] = apart(dense, model, ids=prompt(length=1), at=at + 2)
        result["replaced, cut"] = tuple(model.attentions[0].cache.keys.shape)
        for m in (dense, model):
            for buffer in m.buffers():
                if buffer.dtype is torch.float64:
                    buffer.zero_()
        result["emptied in place"] = apart(dense, model, ids=prompt(), at=torch.arange(5))
        x, mask = torch.ones(1, 2, WIDTH, dtype=torch.float64), dense.mask[None, None, 5:7]
        inner = [m.attentions[0](x, mask, torch.arange(5, 7)) for m in (dense, model)]
        result["a module by itself"] = relative_error(*inner)
        result["and then the whole"] = apart(dense, model, ids=prompt(length=2), at=torch.arange(7, 9))
    inference = _made(3, "buffers", 1)
    with torch.inference_mode():
        result["inference mode"] = apart(*inference, ids=prompt(), at=torch.arange(5))
    result["after inference mode"] = apart(*inference, ids=prompt(), at=torch.arange(5))
    different = prompt() if rank == 0 else prompt() + 1
    result["different inputs"] = raised(lambda: model(different % VOCABULARY, torch.arange(5)))
    result["same on all ranks"] = same(model(prompt(), torch.arange(5)))
    return result


class Averaging(nn.Module):
    """A model in training that keeps a running mean of hidden values, the last state with its gradient, and a count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 320), nn.Linear(320, WIDTH)
        self.register_buffer("mean", torch.zeros(320))
        self.last: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self.count = 0
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.up(x))
        self.mean.mul_(0.9).add_(0.1 * y.detach().mean((0, 1)))
        y = y - self.mean
        if self.last is not None:
            y = y + 0.1 * self.last
        self.last, self.count = y.mean((0, 1)), self.count + 1
        self.seen = y.detach().amax((0, 1))
        return self.down(y) / self.count  # type: ignore[no-any-return]


def training(rank: int, world: int) -> Result:
    """Steps of training, through a state that carries gradients from one call to the next."""
    dense = Averaging()
    model = copy.deepcopy(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autotp.parallelize(model, world, example_inputs=(torch.ones(2, 5, WIDTH, dtype=torch.float64),))
    generator, losses = torch.Generator().manual_seed(1), ([], [])
    for _ in range(3):  # calls, before one backward through all of them
        x = torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64)
        for m, found in zip((dense, model), losses, strict=True):
            found.append(m(x).square().mean())
    for found in losses:
        sum(found).backward()
    full = autotp.full_gradients(model)
    state = autotp.full_state_dict(model)
    return {
        "losses": max(relative_error(a, b) for a, b in zip(*losses, strict=True)),
        "gradients": {n: relative_error(p.grad, full[n]) for n, p in dense.named_parameters()},
        "mean": relative_error(dense.mean, state["mean"]),
        "mean here": tuple(model.mean.shape),
        "last": relative_error(dense.last[160 * rank : 160 * (rank + 1)], model.last),
        "seen": relative_error(dense.seen, model.seen),
        "count": (dense.count, model.count),
    }


def various(rank: int, world: int) -> Result:
    """Training with whatever is kept, optimizer's steps between the calls."""
    from tests.arguments.test_module_state import VARIOUS, Various, _stepped

    result: Result = {}
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for how in VARIOUS:
        dense, model = Various(how), Various(how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            autotp.parallelize(model, world, example_inputs=(x,))
        expected, found = _stepped(dense, dense.parameters(), x), _stepped(model, model.parameters(), x)
        state = autotp.full_state_dict(model)
        result[how] = max(relative_error(a, b) for a, b in zip(expected, found, strict=True))
        result[f"{how}: state"] = max(relative_error(t, state[n]) for n, t in dense.state_dict().items())
    return result


def everything(rank: int, world: int) -> Result:
    """All of it, in one start."""
    return caches(rank, world) | use(rank, world) | training(rank, world) | various(rank, world)
