"""What stays whole because it cannot be split over so many ranks: told before anything changes, or refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autotp
from autotp.plans.plan import Weight
from tests.models import MLP, SmallGPT, TutorialAttention


class Attention(nn.Module):
    """Two blocks of attention by 4 heads and an MLP, with all features mixed between them: no other way to split."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(64, 192, bias=False), "out": nn.Linear(64, 64), "mlp": _mlp(64)})
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            heads = block["qkv"](x.softmax(-1)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*heads.unbind(0))
            x = block["mlp"](block["out"](y.transpose(1, 2).flatten(2)).softmax(-1))
        return x.softmax(-1)


def _mlp(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))


def _attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention()


INPUTS = (torch.randn(2, 8, 64),)


def _warned(model: nn.Module, tp: int, **kwargs: object) -> tuple[autotp.Plan, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = autotp.plan(model, tp, **kwargs)  # type: ignore[arg-type]
    return plan, "\n".join(str(w.message) for w in caught if w.category is autotp.WholeWeightWarning)


def _matrices(plan: autotp.Plan) -> list[Weight]:
    found = [w for w in plan.weights if w.name.endswith(("qkv.weight", "out.weight"))]
    assert len(found) == 4
    return found


def test_more_ranks_than_heads_are_told_with_layer_line_share_and_the_tp_that_would_do() -> None:
    plan, text = _warned(_attention(), 6, example_inputs=INPUTS)
    assert plan.obstacles == _matrices(plan)
    share = sum(w.elements for w in plan.obstacles) / plan.parameters()
    assert f"4 weights, {share:.1%} of the parameters, stay whole on each of 6 ranks" in text
    assert "4 units for 6 ranks" in text
    assert "tp up to 4 would split it" in text
    assert text.endswith("tp = 1 to 4 would split all of them.")
    name, line = re.search(r"\((\w+\.py):(\d+)\)", text).groups()  # type: ignore[union-attr]
    source = (Path(__file__).parent / name).read_text().splitlines()
    assert "scaled_dot_product_attention" in source[int(line) - 1]
    assert "blocks.*.qkv.weight" in text
    assert " ".join(text.split()) in " ".join(str(plan).split()), "the plan says it too"


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_the_tp_that_would_do_does(tp: int) -> None:
    plan, text = _warned(_attention(), tp, example_inputs=INPUTS)
    assert not text
    assert all(w.shards for w in _matrices(plan))


def test_strict_refuses_before_anything_changes() -> None:
    model = _attention()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(autotp.PlanError, match="tp = 1 to 4 would split all of them") as raised:
        autotp.plan(model, 6, example_inputs=INPUTS, strict=True)
    assert "strict=True" in str(raised.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    autotp.plan(model, 4, example_inputs=INPUTS, strict=True)


class Mixing(nn.Sequential):
    """Linears around a softmax over all features, of which no part can do without the others."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 96), nn.Softmax(-1), nn.Linear(96, 32), _mlp())


def test_a_layer_that_no_number_of_ranks_splits() -> None:
    plan, text = _warned(Mixing(), 2, example_inputs=(torch.randn(2, 5, 32),))
    assert [w.name for w in plan.obstacles] == ["0.weight", "2.weight"]
    assert "one piece for 2 ranks, kept together by softmax in 1 (activation.py:" in text
    assert "2 x *.weight" in text
    assert "no tp would split it" in text
    assert "tp = 1 to" not in text


class Branching(nn.Module):
    """An MLP around a branch on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.between, self.other = _mlp(), nn.Linear(32, 32), _mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        if x.sum() > 0:
            x = x + F.linear(x, self.between.weight)
        return self.other(x)


def test_strict_refuses_a_model_that_runs_in_parts() -> None:
    torch.manual_seed(0)
    model = Branching()
    inputs = (torch.randn(2, 5, 32),)
    with pytest.warns(autotp.PartialCaptureWarning):
        autotp.plan(model, 2, example_inputs=inputs)
    with pytest.raises(autotp.PlanError, match=r"cannot be captured as one graph(.|\n)*strict=True"):
        autotp.plan(model, 2, example_inputs=inputs, strict=True)


class Router(nn.Module):
    """Two experts' outputs mixed by a softmax over scores."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 2, bias=False), nn.ModuleList([_mlp(), _mlp()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.gate(x).softmax(-1)
        return sum(e(x) * scores[..., i : i + 1] for i, e in enumerate(self.experts))  # type: ignore[return-value]


def test_what_is_too_small_to_speak_of_is_not_spoken_of() -> None:
    plan, text = _warned(Router(), 4, example_inputs=(torch.randn(2, 5, 32),))
    (gate,) = (w for w in plan.weights if w.name == "gate.weight")
    assert not gate.shards
    assert gate.elements < 0.01 * plan.parameters()
    assert not text, text
    assert all(w.shards for w in plan.weights if "experts" in w.name and len(w.shape) > 1)


def test_the_plan_keeps_the_fewest_collectives_and_the_limits(tmp_path: Path) -> None:
    plan, _ = _warned(_attention(), 6, example_inputs=INPUTS)
    plan.save(tmp_path / "plan.json")
    again = autotp.Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert plan.fewest["forward"][0] == plan.count("forward") == 2  # the MLPs
    total = sum(c.bytes for c in plan.collectives if c.when == "forward")
    assert plan.fewest["forward"][1] == total
    assert f"at least {plan.fewest['backward'][0]}" in str(plan)


class Normed(nn.Module):
    """An MLP behind a norm of whole features, with or without a norm of its split ones."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(96, 32)
        self.between = nn.LayerNorm(96) if inside else nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(self.norm(x.softmax(-1)))))


@pytest.mark.parametrize("inside", [False, True])
def test_the_fewest_bytes_are_of_what_is_communicated(inside: bool) -> None:
    plan = autotp.plan(Normed(inside), 3, example_inputs=(torch.randn(2, 5, 32, requires_grad=True),))
    for when in ("forward", "backward"):
        each = [c for c in plan.collectives if c.when == when]
        assert len(each) == 1 + inside
        assert plan.fewest[when] == (len(each), sum(c.bytes for c in each))


def test_plan_works_on_the_meta_device_and_round_trips(tmp_path: Any) -> None:
    with torch.device("meta"):
        model = SmallGPT()
    plan = autotp.plan(model, 4)
    plan.save(tmp_path / "plan.json")
    assert autotp.Plan.load(tmp_path / "plan.json") == plan
    assert plan.parameters(0) < plan.parameters() / 3
    with pytest.raises(autotp.AutoTPError, match="meta device"):
        autotp.verify(model, 2)


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
