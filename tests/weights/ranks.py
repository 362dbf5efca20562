"""Work on real processes: checkpoints of which each rank reads its share, state dicts, norms, optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import autotp
from autotp.verification.measure import Float64, relative_error
from autotp.weights import load_checkpoint, tensor_source
from tests.comparison import apart, backward, gradients_apart, outputs, raised, same, scaled, storages
from tests.models import IDS, Grouped, Scaled, SmallGPT, make

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
            or max(s.read, default=0) * s.dtype.itemsize > tensor_source.PIECE
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


class CountingReader(tensor_source.Reader):
    """Counts the bytes that come from files."""

    count = 0

    def fill(self, file: tensor_source.WeightFile, offset: int, out: torch.Tensor) -> None:
        CountingReader.count += out.numel()
        super().fill(file, offset, out)


def loaded(rank: int, world: int, folder: Path) -> Result:
    found: Result = {}
    tensor_source.PIECE, tensor_source.ROW = 2048, 64  # so that small weights are read in pieces, too
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


def _pairs(world: int) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Dense and parallel models, with gradients: key-value heads replicated, overlapping, and a tied head."""
    for name, make_one in {
        "replicated": lambda: Grouped(1).double(),
        "overlapping": lambda: Grouped(3).double(),
        "tied": lambda: SmallGPT(layers=1).double(),
    }.items():
        torch.manual_seed(0)
        dense = make_one()
        model = autotp.parallelize(copy.deepcopy(dense), world, example_inputs=(IDS,))
        for m in (dense, model):
            backward(outputs(m(IDS)))
        yield name, dense, model


def norms(rank: int, world: int) -> Result:
    found: Result = {}
    local_norm = torch.nn.utils.clip_grad._get_total_norm.__closure__  # torch's own, before any parallelize
    assert local_norm is not None
    torchs = local_norm[0].cell_contents
    pairs = list(_pairs(world))
    for name, dense, model in pairs:
        errors, equal = {}, True
        for power in (1.0, 2.0, 3.5, float("inf"), -1.0, "inf"):
            for foreach in (None, True, False):
                expected = torchs([p.grad for p in dense.parameters()], power, False, foreach)
                total = get_total_norm([p.grad for p in model.parameters()], power, foreach=foreach)
                errors[power, foreach] = relative_error(expected, total)
                equal &= same(total)
        found[f"{name}: errors"], found[f"{name}: same bits"] = errors, equal
        found[f"{name}: dtype"] = total.dtype
        shares = torchs([p.grad for p in model.parameters()], 2.0)
        found[f"{name}: counting shards only"] = relative_error(errors_of(dense, torchs), shares)
        detached = get_total_norm([p.grad.detach() for p in model.parameters()])
        found[f"{name}: detached"] = relative_error(errors_of(dense, torchs), detached)
        half = get_total_norm([p.grad for n, p in model.named_parameters() if "norm" in n or "k" in n])
        expected = torchs([p.grad for n, p in dense.named_parameters() if "norm" in n or "k" in n])
        found[f"{name}: some"] = relative_error(expected, half)
        found[f"{name}: zero"] = raised(lambda m=model: get_total_norm([p.grad for p in m.parameters()], 0.0))

    _, dense, model = pairs[0]
    other_dense, other = pairs[1][1:]
    torch.manual_seed(7)
    extra = [nn.Linear(5, 5).double() for _ in range(2)]
    for e in extra:
        e.load_state_dict(extra[0].state_dict())
        e(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    many = [*model.parameters(), *extra[0].parameters(), *other.parameters()]
    expected = torchs([p.grad for p in (*dense.parameters(), *extra[1].parameters(), *other_dense.parameters())])
    found["two models and another"] = relative_error(expected, get_total_norm([p.grad for p in many]))

    total = clip_grad_norm_(model.parameters(), 0.5)
    expected = clip_grad_norm_(dense.parameters(), 0.5)
    found["clipped"] = relative_error(expected, total), gradients_apart(dense, model)
    found["clipped to"] = float(get_total_norm([p.grad for p in model.parameters()]))
    for m in (dense, model):
        clip_grads_with_norm_(m.parameters(), 0.1, expected)
        clip_grad_value_(m.parameters(), 1e-3)
    found["values"] = gradients_apart(dense, model)
    found["different max_norm"] = raised(lambda: clip_grad_norm_(model.parameters(), 1.0 + (rank == 1)))
    weight = model.head.weight
    if rank == 1:
        weight.grad[0] = float("nan")
    found["not finite"] = raised(lambda: clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True))
    if rank == 1:
        weight.grad = None
    found["no gradient on rank 1"] = raised(lambda: clip_grad_norm_(model.parameters(), 1.0))
    model.zero_grad()
    found["no gradients"] = float(clip_grad_norm_(model.parameters(), 1.0))
    plain = nn.Linear(3, 3)
    plain(torch.ones(1, 3)).sum().backward()
    found["other models"] = torch.equal(
        clip_grad_norm_(plain.parameters(), 100.0 + rank), torchs([p.grad for p in plain.parameters()])
    )
    return found


def errors_of(dense: nn.Module, torchs: Callable[..., torch.Tensor]) -> torch.Tensor:
    return torchs([p.grad for p in dense.parameters()], 2.0)


def optimizers(rank: int, world: int) -> Result:
    """Optimizers that have stepped before, their checkpoints, and those that are refused."""
    found: Result = {}
    for name, make_optimizer in {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, 1e-2, foreach=False),
        "foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
        "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    }.items():
        pairs = []
        for _ in range(2):
            m = Scaled().double().eval()
            pairs.append((m, make_optimizer(m.parameters())))
        x = torch.linspace(-1, 1, 3 * 5 * 64, dtype=torch.float64).view(3, 5, 64).sin()

        def step(m: nn.Module, optimizer: Any, x: torch.Tensor = x) -> None:
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()

        for m, optimizer in pairs:
            step(m, optimizer)  # dense, both of them: the optimizers have state
        (dense, _), (model, _) = pairs
        autotp.parallelize(model, world, example_inputs=(x,))
        for m, optimizer in pairs * 3:
            step(m, optimizer)
        full, state = autotp.full_state_dict(model), dense.state_dict()
        found[name] = max(relative_error(state[n], full[n], 1e-3) for n in state)
        pairs[1][1].load_state_dict(copy.deepcopy(pairs[0][1].state_dict()))  # a dense checkpoint
        for m, optimizer in pairs:
            step(m, optimizer)
        full, state = autotp.full_state_dict(model), dense.state_dict()
        found[f"{name}: loaded"] = max(relative_error(state[n], full[n], 1e-3) for n in state)
    for kind in ("Adafactor", "Muon", "LBFGS"):
        if hasattr(torch.optim, kind):
            matrices = [p for p in model.parameters() if p.dim() == 2]
            optimizer = getattr(torch.optim, kind)(matrices)
            found[kind] = raised(lambda: optimizer.step(lambda: model(x).sum()))  # noqa: B023
    return found


def state_dicts(rank: int, world: int) -> Result:
    """State dicts: dense, local, wrong, partial, assigned, and as a part of something bigger."""
    found: Result = {}
    dense, model, x = scaled(world)
    other = Scaled().double().eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.25)

    state = other.state_dict()
    model.load_state_dict(state)
    found["dense state"] = apart(other, model, x=x)
    local = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(dense.state_dict())
    found["and back"] = apart(dense, model, x=x)
    model.load_state_dict(local)
    found["local state"] = apart(other, model, x=x)
    wrong = {**state, "second.0.weight": torch.zeros(77, 64)}
    found["wrong state"] = raised(lambda: model.load_state_dict(wrong))
    found["untouched"] = apart(other, model, x=x)
    part = {n: t for n, t in dense.state_dict().items() if n.startswith("first")}
    dense.load_state_dict({**state, **part})
    found["missing keys"] = raised(lambda: model.load_state_dict(part))
    model.load_state_dict(part, strict=False)
    found["partial state"] = apart(dense, model, x=x)
    outer = nn.ModuleDict({"inner": model})
    outer.load_state_dict({f"inner.{n}": t for n, t in state.items()})
    found["prefixed state"] = apart(other, model, x=x)
    model.load_state_dict(dense.state_dict(), assign=True)
    found["assigned state"] = apart(dense, model, x=x)
    found["assigned shapes"] = [tuple(p.shape) for p in model.second.parameters()]
    full = autotp.full_state_dict(model)
    found["full state"] = all(torch.equal(full[n], t) for n, t in dense.state_dict().items())
    return found
