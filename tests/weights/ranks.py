"""Work on real processes for models without weights, of which each rank reads its share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autotp
from autotp.verification.measure import Float64, relative_error
from autotp.weights import checkpoint, load_checkpoint
from tests.comparison import apart, backward, gradients_apart, outputs, raised, storages
from tests.models import make

Result = dict[str, Any]
FILES = {
    "llama": "llama",  # a folder with an index; fewer key-value heads than four ranks
    "gpt": "gpt.pt",  # a tied head, one of whose names is there
    "gpt2": "gpt2.safetensors",  # weights the other way round, fused queries, keys and values
    "neox": "neox",  # a folder with one file
}


class Slices:
    """A tensor as a file gives it: it has a shape and a dtype, and notes what is read of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype
        self.read: list[int] = []

    def __getitem__(self, at: Any) -> torch.Tensor:
        part = self.tensor[at]
        self.read.append(part.numel())
        return part


class Recorded(Mapping[str, Slices]):
    """A checkpoint that notes what is read of it."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.slices = {n: Slices(t) for n, t in state.items()}

    def __getitem__(self, name: str) -> Slices:
        return self.slices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.slices)

    def __len__(self) -> int:
        return len(self.slices)

    def beyond(self, model: nn.Module) -> list[str]:
        """The weights of which more was read than the rank holds, or more than a piece at once."""
        own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        return [
            n
            for n, s in self.slices.items()
            if sum(s.read) > own[n].numel() + load_checkpoint.FIRST
            or max(s.read, default=0) * s.dtype.itemsize > checkpoint.PIECE
        ]


def empty(name: str) -> nn.Module:
    with autotp.empty_weights():
        model, _ = make(name)
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    return model


def _compared(name: str, dense: nn.Module, model: nn.Module) -> Result:
    """Outputs and every gradient, at two sizes, and the state."""
    errors = []
    for batch, length in ((2, 16), (3, 7)):
        _, own = make(name, batch, length, seed=batch)
        for m in (dense, model):
            m.zero_grad(set_to_none=True)
        expected, found = outputs(dense(**own)), outputs(model(**own))
        backward(expected)
        backward(found)
        errors += [relative_error(a, b) for a, b in zip(expected, found, strict=True)]
        errors.append(gradients_apart(dense, model))
    full, state = autotp.full_state_dict(model), dense.state_dict()
    held = sum(p.numel() for p in model.parameters())
    return {
        "error": max(errors),
        "state": list(full) == list(state) and all(torch.equal(full[n], state[n]) for n in state),
        "only its share": sum({s.data_ptr(): s.nbytes() for s in storages(model)}.values()) == 8 * held,
        "captures": model.__dict__["_autotp"].cache.captures.count,
    }


class CountingReader(checkpoint.Reader):
    """Counts the bytes that come from files."""

    count = 0

    def fill(self, path: Path, offset: int, out: torch.Tensor) -> None:
        CountingReader.count += out.numel()
        super().fill(path, offset, out)


def loaded(rank: int, world: int, folder: Path) -> Result:
    found: Result = {}
    checkpoint.PIECE, checkpoint.ROW = 2048, 64  # so that small weights are read in pieces, too
    load_checkpoint.Reader = CountingReader  # type: ignore[misc]
    with Float64():
        for name, file in FILES.items():
            dense, kwargs = make(name)
            model = empty(name)
            before, CountingReader.count = [id(p) for p in model.parameters()], 0
            assert autotp.parallelize(model, world, example_inputs=kwargs, weights=folder / file) is model
            assert before == [id(p) for p in model.parameters()]
            shares = [sum(p.nbytes for p in m.parameters()) for m in (model, dense)]
            found[f"{name}: bytes"] = CountingReader.count, *shares
            found[name] = _compared(name, dense, model)
        dense, kwargs = make("llama")
        plan = autotp.plan(dense, world, example_inputs=kwargs)
        state = Recorded(dense.state_dict())
        model = autotp.parallelize(empty("llama"), world, plan=plan, example_inputs=kwargs, weights=state)
        found["mapping and plan"] = _compared("llama", dense, model)
        found["read beyond its share"] = state.beyond(model)
        found["pieces"] = max(len(s.read) for s in state.slices.values())
        for s in state.slices.values():
            s[...]
        found["control: read whole"] = len(state.beyond(model))

        other, _ = make("llama", seed=5)
        model.load_state_dict(other.state_dict())
        found["loaded again"] = apart(other, model, **kwargs)

        model, _ = make("llama", seed=7 + rank)  # with weights already, which count no longer
        kept = outputs(model(**kwargs))  # and with it the nodes that remember the shapes of weights
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        autotp.parallelize(model, world, example_inputs=kwargs, weights=str(folder / "llama"))
        found["gradients are kept"] = all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
        found["in place of others"] = _compared("llama", dense, model)
        assert any(y.requires_grad for y in kept)

        wrong = dense.state_dict()
        wrong["model.layers.1.mlp.down_proj.weight"] = wrong["model.layers.1.mlp.down_proj.weight"] * 1.01
        model = autotp.parallelize(empty("llama"), world, example_inputs=kwargs, weights=wrong)
        found["control: one weight differs"] = apart(dense, model, **kwargs)

        narrow = {n: t.to(torch.bfloat16) for n, t in dense.state_dict().items()}
        model = autotp.parallelize(empty("llama"), world, example_inputs=kwargs, weights=narrow)
        rounded, _ = make("llama")
        rounded.load_state_dict({n: t.double() for n, t in narrow.items()})
        found["cast"] = apart(rounded, model, **kwargs)
        found["dtypes"] = {p.dtype for p in model.parameters()}
    return found


class Branching(nn.Module):
    """What cannot be captured whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu() if x.sum() > 0 else self.up(x))


class Table(nn.Module):
    """A buffer that no checkpoint has, and one that each has."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("scale", torch.full((32,), 2.0))
        self.register_buffer("table", torch.arange(16.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x + self.table).relu() * self.scale)


def refused(rank: int, world: int, folder: Path) -> Result:
    """Errors, each on all ranks and before anything has changed."""
    x, found = torch.ones(3, 16), {}
    torch.manual_seed(0)
    state = Table().state_dict()

    def load(weights: Any, model: nn.Module | None = None) -> str:
        if model is None:
            with autotp.empty_weights():
                model = Table()
        said = raised(lambda: autotp.parallelize(model, world, example_inputs=(x,), weights=weights))
        unchanged = all(p.is_meta for p in model.parameters()) and "_autotp" not in model.__dict__
        return said if unchanged else f"changed: {said}"

    lacking = {n: t for n, t in state.items() if n not in ("up.weight", "scale")}
    found["missing"] = load(lacking)
    found["unexpected"] = load({**state, "bias": torch.ones(1), "table": torch.ones(16)})
    found["shape"] = load({**state, "up.weight": torch.ones(16, 32)})
    found["kind"] = load({**state, "up.weight": torch.ones(32, 16, dtype=torch.int8)})
    found["no tensor"] = load({**state, "epoch": 3})
    found["ranks differ"] = load(state if rank else {**state, "up.weight": torch.ones(32, 16).double()})
    found["values differ"] = load({**state, "up.weight": state["up.weight"] + (0.1 if rank else 0)})
    found["no file on one rank"] = load(state if rank else folder / "nowhere.safetensors")
    cut = folder / f"cut{rank}.safetensors"
    cut.write_bytes((folder / "table.safetensors").read_bytes()[:-4])
    found["cut short"] = load(cut)
    found["without weights"] = load(None)
    with autotp.empty_weights():
        branching = Branching()
    found["in parts"] = load(Branching().state_dict(), branching)
    with torch.device("meta"):
        meta = Table()
    found["buffer"] = load(state, meta)
    unreadable = {**state, "down.weight": Unreadable(state["down.weight"])} if rank else state
    found["while reading, on one rank"] = load(unreadable)

    dense = Table()
    with autotp.empty_weights():
        model = Table()
    found["then"] = apart(dense, _loaded(model, world, x, {**dense.state_dict(), "table": torch.zeros(16)}), x=x)
    return found


def _loaded(model: nn.Module, world: int, x: torch.Tensor, weights: Any) -> nn.Module:
    return autotp.parallelize(model, world, example_inputs=(x,), weights=weights)


class Unreadable(Slices):
    """What fails after all, and the first row, has been looked at."""

    def __getitem__(self, at: Any) -> torch.Tensor:
        if at[0].stop > 1:
            raise OSError("the disk is gone")
        return super().__getitem__(at)
