"""Work on real processes: adapters of a parallelized model are merged, switched and unloaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import autotp
from tests.comparison import apart, gradients_apart, raised
from tests.models import IDS, Grouped

Result = dict[str, Any]
KINDS = ("lora", "dora", "modules to save")


def adapted(kind: str) -> Any:
    """A model of 6 query heads on 2 key-value heads, fewer than three ranks, with two adapters off zero."""
    from peft import LoraConfig, get_peft_model

    inside = ["q", "v", "out"] if kind == "modules to save" else ["q", "k", "v", "out"]
    config = LoraConfig(
        r=3, target_modules=inside if kind == "dora" else [*inside, "embed"], use_dora=kind == "dora",
        modules_to_save=["head"] if kind == "modules to save" else None,
    )  # fmt: skip
    torch.manual_seed(5)
    model = get_peft_model(Grouped(2), config)
    model.add_adapter("other", copy.deepcopy(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(torch.randn_like(p) * 0.2)
    return model.double().eval()


def states_apart(dense: nn.Module, model: nn.Module) -> float:
    """The largest difference between two full state dicts; infinite if their names differ."""
    expected, found = dense.state_dict(), autotp.full_state_dict(model)
    if list(expected) != list(found):
        return float("inf")
    return max(float((expected[name] - found[name]).abs().max()) for name in expected)


def merges(rank: int, world: int) -> Result:
    warnings.simplefilter("ignore")
    return {kind: _merges(kind, world, kind == "lora") for kind in KINDS}


def _merges(kind: str, world: int, every: bool) -> Result:
    found: Result = {}
    dense, model = adapted(kind), adapted(kind)
    model = autotp.parallelize(model, world, example_inputs=(IDS,))
    layouts = dict(model.__dict__["_autotp"].weight_layouts)
    found["split"] = any("lora_" in name for name in layouts) and any("base_layer" in name for name in layouts)

    def step(name: str, do: Callable[[Any], Any]) -> None:
        before = dense(IDS)
        for m in (dense, model):
            do(m)
        moved = float((dense(IDS) - before).abs().max())
        found[name] = max(apart(dense, model, ids=IDS), states_apart(dense, model)), moved

    def rescaled(m: Any, scale: float) -> None:
        for layer in m.modules():
            if isinstance(getattr(layer, "scaling", None), dict):
                layer.scaling["default"] = scale

    step("as before", lambda m: None)
    if every or "save" in kind:
        step("other adapter", lambda m: m.set_adapter("other"))
        step("first adapter again", lambda m: m.set_adapter("default"))
    if every:
        step("scale", lambda m: rescaled(m, 0.7))
    step("merge", lambda m: m.merge_adapter())
    step("unmerge", lambda m: m.unmerge_adapter())
    with dense.disable_adapter(), model.disable_adapter():
        found["disabled"] = apart(dense, model, ids=IDS)
    step("merge safely", lambda m: m.merge_adapter(safe_merge=True))
    if every:
        with dense.disable_adapter(), model.disable_adapter():
            found["disabled while merged, gradients on"] = raised(lambda: model(IDS))
            with torch.no_grad():
                found["disabled while merged"] = apart(dense, model, ids=IDS), states_apart(dense, model)
    step("unmerge again", lambda m: m.unmerge_adapter())
    for m in (dense, model):
        optimizer = torch.optim.SGD(m.parameters(), 0.01)
        m.zero_grad()
        m(IDS).sin().sum().backward()
        optimizer.step()
    step("a step of training later", lambda m: None)
    dense, model = dense.merge_and_unload(), model.merge_and_unload()
    found["merge and unload"] = apart(dense, model, ids=IDS), states_apart(dense, model)
    found["class"] = type(model).__name__
    for m in (dense, model):
        m.requires_grad_(True)
        m.zero_grad()
        m(IDS).sin().sum().backward()
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0).item() for m in (dense, model)]
    found["training without adapters"] = gradients_apart(dense, model), abs(norms[0] / norms[1] - 1)
    model.load_state_dict(Grouped(2).double().state_dict())
    found["loading without adapters"] = apart(Grouped(2).double(), model, ids=IDS)
    return found


def copies(rank: int, world: int) -> Result:
    """Copies of a model with adapters, and what is left when they are taken away."""
    warnings.simplefilter("ignore")
    found: Result = {}
    dense, model = adapted("lora"), autotp.parallelize(adapted("lora"), world, example_inputs=(IDS,))
    twin = copy.deepcopy(model)
    dense.merge_adapter()
    twin.merge_adapter()
    found["merge of a copy"] = apart(dense, twin, ids=IDS), apart(adapted("lora"), model, ids=IDS)
    dense, model = adapted("lora").unload(), model.unload()
    found["unload"] = apart(dense, model, ids=IDS), states_apart(dense, model)
    found["copy without adapters"] = apart(dense, copy.deepcopy(model), ids=IDS), 0.0
    twin.delete_adapter("other")
    found["adapter deleted"] = raised(lambda: twin(IDS))
    return found


class InParts(nn.Module):
    """A model that branches on its input, so that it is captured in parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.inner = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y * 2 if float(x.sum()) > 0 else y


def in_parts(rank: int, world: int) -> Result:
    """Merges in a model that was captured in parts, and unloading, which is refused."""
    from peft import LoraConfig, get_peft_model

    warnings.simplefilter("ignore")
    found: Result = {}
    x = torch.randn(3, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def make() -> Any:
        torch.manual_seed(7)
        config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
        return get_peft_model(InParts(), config).double().eval()

    dense, model = make(), autotp.parallelize(make(), world, example_inputs=(x,))
    found["in parts"] = hasattr(model.__dict__["_autotp"], "parts")
    for name in ("as before", "merge_adapter", "unmerge_adapter"):
        for m in (dense, model):
            getattr(m, name, lambda: None)()
        found[name] = max(apart(dense, model, x=x), states_apart(dense, model))
    found["unload"] = raised(model.unload)
    found["after"] = apart(dense, model, x=x)
    return found


def differing(rank: int, world: int) -> Result:
    """Merges that only one rank asks for, or with other arguments."""
    warnings.simplefilter("ignore")
    dense, model = adapted("lora"), autotp.parallelize(adapted("lora"), world, example_inputs=(IDS,))
    found = {
        "other adapters": raised(lambda: model.merge_adapter(adapter_names=["other" if rank else "default"])),
        "as before": apart(dense, model, ids=IDS),
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            if rank == 1 and "q.lora_B.default" in name:
                p.view(-1)[:1] = float("nan")
    found["not finite on one rank"] = raised(lambda: model.merge_adapter(safe_merge=True))
    kept = autotp.parallelize(adapted("lora"), world, example_inputs=(IDS,))
    found["merge on one rank"] = raised(lambda: kept.merge_adapter() if rank else kept(IDS))
    return found


class MergesInEval(nn.Linear):
    """A layer of the first libraries of adapters: it merges when it goes to eval mode."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(3, inputs)), nn.Parameter(torch.randn(outputs, 3) / 8)
        self.merged = False

    def train(self, mode: bool = True) -> MergesInEval:
        super().train(mode)
        if self.merged == mode:
            ranked = torch.linalg.svdvals(self.weight.data).sum() / 16  # nothing that a shard could tell
            delta = self.up @ self.down
            self.weight.data += (delta / ranked) if not mode else -(delta / self.ranked)
            self.ranked, self.merged = float(ranked), not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T


def flags(rank: int, world: int) -> Result:
    """Python state of other kinds on which a forward branches, and a layer that merges when its mode changes."""
    found: Result = {}

    dense, parallel = Flagged().double(), Flagged().double()
    x = torch.randn(3, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    autotp.parallelize(parallel, world, example_inputs=(x,))
    captures = parallel.__dict__["_autotp"].cache.captures

    def step(name: str, do: Callable[[Any], Any]) -> None:
        before, count = dense(x), captures.count
        for m in (dense, parallel):
            do(m)
        parallel(x=x)
        new = captures.count - count
        found[name] = apart(dense, parallel, x=x), float((dense(x) - before).abs().max()), new, captures.count - count

    step("list", lambda m: m.inner.steps.append("double"))
    step("list, item", lambda m: m.inner.steps.__setitem__(0, "triple"))
    step("set", lambda m: m.inner.off.add("tanh"))
    step("dict", lambda m: m.inner.scales.update(a=3.0))
    step("nested", lambda m: m.inner.table["a"].append(1))
    step("list, back", lambda m: m.inner.steps.clear())
    step("merging layer", lambda m: m.eval())
    step("unmerging layer", lambda m: m.train())
    return found


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = MergesInEval(64, 96), nn.Linear(96, 64)
        self.steps: list[str] = []
        self.off: set[str] = set()
        self.scales = {"a": 1.0}
        self.table: dict[str, list[int]] = {"a": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x) * self.scales["a"]
        for step in self.steps:
            y = y * {"double": 2, "triple": 3}[step]
        y = y if "tanh" in self.off else y.tanh()
        return self.down(y) + len(self.table["a"])


class Flagged(nn.Module):
    """A model that branches on lists, sets and dicts of its submodule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.inner = _Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)
