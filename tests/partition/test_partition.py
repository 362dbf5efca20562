"""Models that cannot be captured whole: parts, the Python between them, and what capture would lose."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import autotp
from autotp.capture import custom_backward
from autotp.partition import module_calls, partition
from autotp.plans.make_plan import plan_of
from autotp.plans.plan import Plan
from autotp.verification.measure import Float64, relative_error
from autotp.verification.report import Report
from autotp.verification.simulation import Simulation
from autotp.verification.verify import compare
from tests.models import Block

pytestmark = pytest.mark.filterwarnings("ignore::autotp.PartialCaptureWarning")


class _Scale(torch.autograd.Function):
    """The identity whose gradient is three times too large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 3 * grad


scale = _Scale.apply  # bound before anything could be patched


@torch.library.custom_op("autotp_tests::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


@torch.library.custom_op("autotp_tests::square_without_fake", mutates_args=())
def square_without_fake(x: torch.Tensor) -> torch.Tensor:
    return x * x


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


for op in (square, square_without_fake):  # a derivative of their own: three times the true one
    op.register_autograd(lambda ctx, grad: 6 * grad * ctx.saved_tensors[0], setup_context=_keep)
square.register_fake(torch.empty_like)


class Net(nn.Module):
    """Blocks and a head; ``between`` runs on what each block returns."""

    def __init__(
        self, between: Callable[[Net, torch.Tensor], torch.Tensor] | None = None, tied: str = "", blocks: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, 64)
        self.blocks = nn.ModuleList(Block(64, 4) for _ in range(blocks))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 101, bias=False)
        self.between, self.tied = between, tied
        if tied == "parameter":
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
            x = x if self.between is None else self.between(self, x)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.tied == "in forward" else self.head(x)


class _Fast(torch.autograd.Function):
    """A GELU with the derivative that autograd would take."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(1.702 * x)
        return grad * (s + 1.702 * x * s * (1 - s))


class _Clipped(torch.autograd.Function):
    """The identity, with no gradient where it is large."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.where(ctx.saved_tensors[0].abs() > 5, 0.0, grad)


def _branch(net: Net, x: torch.Tensor) -> torch.Tensor:
    return x * 2 if (x > 0).any() else x


def _hooked(net: Net, x: torch.Tensor) -> torch.Tensor:
    x = x * 1
    if x.requires_grad:
        x.register_hook(lambda grad: 3 * grad)
    return x


def _own_gradient(net: Net, x: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad((x**3).sum(), x, retain_graph=True)
    return x * grad / 10


def _numpy(net: Net, x: torch.Tensor) -> torch.Tensor:
    return x + torch.from_numpy(x.detach().numpy() * 2)


def _pointer(net: Net, x: torch.Tensor) -> torch.Tensor:
    return x * (2 if x.data_ptr() else 3)  # as a kernel is given it


def _list(net: Net, x: torch.Tensor) -> torch.Tensor:
    return x * float(len(set(x.argmax(-1).flatten().tolist())))


BETWEEN: dict[str, Callable[[Net, torch.Tensor], torch.Tensor]] = {
    "a branch on values": _branch,
    "an autograd function": lambda net, x: scale(x),
    "a custom op without fake": lambda net, x: square_without_fake(x) / 10,
    "a tensor hook": _hooked,
    "gradients in forward": _own_gradient,
    "numpy": _numpy,
    "a data pointer": _pointer,
    "a list of values": _list,
    "a reentrant checkpoint": lambda net, x: checkpoint(torch.tanh, x, use_reentrant=True),
    "a branch, detach and no grad": lambda net, x: _branch(net, x) * x.detach() + torch.no_grad()(torch.sin)(x),
}


def verified(
    model: nn.Module, *inputs: Any, tp: int = 2, tolerance: float = 1e-10, **kwargs: Any
) -> tuple[Report, Plan]:
    """Compare in float64, and plan."""
    torch.manual_seed(0)
    if not inputs and not kwargs:
        inputs = (torch.randint(0, 101, (2, 8)),)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    with Float64() if tolerance == 1e-10 else contextlib.nullcontext():
        division = partition.partition_model(model.double(), tp, inputs, kwargs)
        report = compare(model, Simulation(model, tp, division, record=True), inputs, kwargs, tolerance)
        return report, plan_of(division, tp)


def split(plan: Plan) -> set[str]:
    return {w.name for w in plan.weights if w.shards}


@pytest.mark.parametrize("name", BETWEEN)
def test_python_between_parts(name: str) -> None:
    report, plan = verified(Net(BETWEEN[name], blocks=1))
    assert report.ok, str(report)
    assert len(report.gradients) == 15
    assert {"blocks.0.qkv.weight", "blocks.0.down.weight", "head.weight"} <= split(plan)
    assert plan.graph_breaks, "captured whole: this test tests nothing"
    assert plan.count("forward") == 2 + 1
    assert plan.count("backward") == 2 + 1


@pytest.mark.parametrize("name", ["an autograd function", "a tensor hook"])
def test_without_the_refusals_those_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_backward, "_REFUSED", {})
    monkeypatch.setattr("autotp.capture.export.refuse_own_backward", lambda *_: None)
    monkeypatch.setattr("autotp.capture.export.refuse_function", lambda *_: None)
    report, plan = verified(Net(BETWEEN[name], blocks=1))
    assert not plan.graph_breaks
    assert not report.ok


def test_a_custom_op_is_whole_named_and_keeps_its_derivative() -> None:
    report, plan = verified(Net(lambda net, x: square(x) / 10, blocks=1))
    assert report.ok, str(report)
    assert not plan.graph_breaks
    model = nn.Sequential(nn.Linear(64, 256), _Calls(lambda x: square(x) / 10), nn.Linear(256, 64))
    report, plan = verified(model, torch.randn(2, 8, 64).double())
    assert report.ok, str(report)
    assert any("square" in g for g in plan.gathered), str(plan)


class _Calls(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@pytest.mark.parametrize("function", [_Fast, _Clipped, _Scale])
def test_functions_that_compute_the_derivative_themselves_are_captured(function: Any) -> None:
    apply, forward = function.apply, function.forward
    model = nn.Sequential(nn.Linear(64, 256), _Calls(lambda x: apply(x)), nn.Linear(256, 64))
    report, plan = verified(model, torch.randn(2, 8, 64).double())
    assert report.ok, str(report)
    assert bool(plan.graph_breaks) == (function is not _Fast)
    assert function.forward is forward
    if function is _Fast:
        assert plan.share_split == 1.0
        assert not plan.gathered
    else:
        assert f"autograd.Function {function.__name__} has a backward of its own" in str(plan)


def test_bloom_in_training_is_captured_whole_with_its_own_gelu() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        hidden_size=64, n_layer=1, n_head=4, vocab_size=1001, hidden_dropout=0.0, attention_dropout=0.0
    )
    ids = torch.randint(4, 100, (2, 12))
    model = BloomForCausalLM(config).train()
    report, plan = verified(model, input_ids=ids, labels=ids, use_cache=False, tolerance=1e-5)
    assert report.ok, str(report)
    assert not plan.graph_breaks
    assert plan.share_split == 1.0


def test_hooks_of_submodules() -> None:
    net = Net()
    net.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    net.blocks[0].register_full_backward_pre_hook(lambda module, grads: (grads[0] * 3,))
    net.blocks[1].up.register_forward_hook(lambda module, args, output: output * 2)
    net.blocks[1].out.register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))
    report, plan = verified(net)
    assert report.ok, str(report)
    assert {s.module for s in plan.graph_breaks} == {"", "blocks.1"}  # blocks.0's own hooks run around it
    assert "blocks.1: out (Linear) has a backward hook" in str(plan)
    assert {"blocks.0.qkv.weight", "blocks.1.down.weight", "blocks.1.up.weight"} <= split(plan)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("tied", ["parameter", "in forward"])
def test_a_weight_of_several_parts_has_one_layout_and_one_of_the_python_between_stays_whole(tied: str, tp: int) -> None:
    report, plan = verified(Net(_branch, tied), tp=tp)
    assert report.ok, str(report)
    assert ("embed.weight" in split(plan)) == (tied == "parameter")
    assert len([w for w in plan.weights if w.shape == (101, 64)]) == (1 if tied == "parameter" else 2)


def test_seams_are_named_and_the_share_that_stays_whole() -> None:
    ids = torch.randint(0, 101, (2, 8))
    with pytest.warns(autotp.PartialCaptureWarning) as caught:
        plan = autotp.plan(Net(_branch, "in forward"), 2, example_inputs=(ids,))
    text = str(caught[0].message)
    assert "in 2 parts: 2 x blocks.*" in text
    assert f"the model ({__file__}:{_branch.__code__.co_firstlineno + 1})" in text
    assert "depends on the values in a tensor" in text
    whole = 2 * 101 * 64 + 2 * 64
    assert f"{100 * whole / plan.parameters():.1f}% of the parameters" in text
    assert autotp.Plan.from_json(plan.to_json()) == plan
    as_in_version_0_1 = plan.to_json().replace('"graph_breaks"', '"seams"')
    assert autotp.Plan.from_json(as_in_version_0_1) == plan
    for old, new in (("seams", "graph_breaks"), ("stored", "weight_layouts")):
        with pytest.warns(DeprecationWarning, match=f"Plan.{old} is now {new}"):
            assert getattr(plan, old) == getattr(plan, new)
        with pytest.raises(AttributeError):
            setattr(plan, old, None)


class Shared(nn.Module):
    """One block called twice, once on a longer value; one never; a flag that code around it sets; an output tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.unused, self.flagged = Net().blocks[0], Net().blocks[1], Flagged()

    def forward(self, x: torch.Tensor, extra: bool = False) -> torch.Tensor:
        x = self.block(x)
        x = self.block(torch.cat([x, x], 1))
        self.flagged.flag = bool((x > 1e9).any()) or extra
        x, again = self.flagged(x, {"other": x})
        return x + again


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.flag = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), False

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mlp(x + more["other"]) * (5 if self.flag else 1), x


def test_modules_called_twice_never_and_with_flags_set() -> None:
    model = Shared()
    x = torch.randn(2, 8, 64).double()
    report, plan = verified(model, x)
    assert report.ok, str(report)
    assert "block.qkv.weight" in split(plan)
    assert not any(n.startswith("unused") for n in split(plan))
    assert len([c for c in plan.collectives if c.module.startswith("block") and c.when == "forward"]) == 4
    parallel = autotp.simulate(model, 2, example_inputs=(x,))
    for extra in (True, False):  # not what the example did
        assert relative_error(model(x, extra), parallel(x, extra)) < 1e-12


class Keeps(nn.Module):
    """A block whose forward does more than return a value: what, the model's code can see."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how, self.last = Net().blocks[0], how, None
        self.outside = [nn.Parameter(torch.randn(64), requires_grad=False).double()]
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: torch.Tensor, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        y = self.inner(x)
        if self.how == "a container":
            kept["x"] = y
        elif self.how == "an attribute":
            self.last = y
        elif self.how == "a buffer":
            self.mean.add_(y.detach().mean((0, 1)))
        elif self.how == "an input":
            kept["x"].mul_(2)
        return y * self.outside[0] if self.how == "a tensor that is no parameter" else y


class Sees(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.keeps = Keeps(how)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = {"x": x * 1}
        y = self.keeps(x, kept)
        y = y * 2 if (y > 0).any() else y
        y = y + kept["x"] + self.keeps.mean
        return y if self.keeps.last is None else y + self.keeps.last


HOWS = ["a container", "an attribute", "a buffer", "an input", "a tensor that is no parameter"]


@pytest.mark.parametrize("how", HOWS)
def test_what_forward_does_beside_returning_is_done(how: str) -> None:
    model = Sees(how)
    report, plan = verified(model, torch.randn(2, 8, 64).double())
    done_by_a_graph = how in ("a container", "an input")
    assert {s.module for s in plan.graph_breaks} == {""} if done_by_a_graph else {"", "keeps"}, str(plan)
    assert "keeps.inner.qkv.weight" in split(plan)
    if how != "a buffer":
        assert report.ok, str(report)
        return
    x, seen = torch.randn(2, 8, 64).double(), []  # the two runs of a comparison both change it
    for each in (model, autotp.simulate(model, 2, example_inputs=(x,))):
        model.keeps.mean.zero_()
        seen.append((each(x), model.keeps.mean.clone()))
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(*seen, strict=True))
    assert seen[0][1].any()


def test_a_weight_that_is_read_on_a_branch_not_taken_before_is_an_error() -> None:
    def between(net: Net, x: torch.Tensor) -> torch.Tensor:
        return x + net.head.weight.sum() if (x > 1e6).any() else x

    model = Net(between)
    ids = torch.randint(0, 101, (2, 8))
    parallel = autotp.simulate(model, 2, example_inputs=(ids,))
    assert relative_error(model(ids), parallel(ids)) < 1e-5
    with torch.no_grad():
        model.blocks[0].down.bias.add_(1e7)
    with pytest.raises(autotp.AutoTPError, match=r"head\.weight is split .* reads it \(sum\)"):
        parallel(ids)


@pytest.mark.parametrize(("by", "is_refused"), [(2, False), (0.5, False), (torch.tensor(2.0), True)])
def test_a_weight_may_be_scaled_in_place_by_a_number(by: Any, is_refused: bool) -> None:
    """As RWKV does before the first token: each shard becomes what it would be cut from the scaled weight."""

    def between(net: Net, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if (x > 1e6).any() and not hasattr(net, "scaled"):
                net.scaled = True
                net.head.weight.mul_(by)
                net.head.weight.div_(by).mul_(by)
        return x

    model = Net(between).double()
    ids = torch.randint(0, 101, (2, 8))
    parallel = autotp.simulate(model, 2, example_inputs=(ids,))
    with torch.no_grad():
        model.blocks[0].down.bias.add_(1e7)
        dense = copy.deepcopy(model)
        if is_refused:
            with pytest.raises(autotp.AutoTPError, match=r"head\.weight is split .* reads it \(mul_\)"):
                parallel(ids)
        else:
            before = model.head.weight.clone()
            assert relative_error(dense(ids), parallel(ids)) < 1e-5
            assert torch.equal(model.head.weight, before * by)


def test_watching_a_run_changes_nothing() -> None:
    model = Sees("a buffer").train()
    model.keeps.inner.drop = nn.Dropout(0.5)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    x = torch.randn(2, 8, 64)
    kept = x.clone()
    state, held = torch.get_rng_state(), dict(model.keeps.__dict__)
    observed = module_calls.observe(model, (x,), {})
    assert len(observed.calls[id(model.keeps.inner)]) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert model.keeps.__dict__ == held
    assert torch.equal(x, kept)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_checkpointed_parts_drop_the_same_elements_when_run_again() -> None:
    class Dropping(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.on = Dropping(64, 4), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2 if (x > 0).any() else x
            if self.on:
                return checkpoint(self.block, x, use_reentrant=False)
            return self.block(x)

    model = Checkpointed().double()
    x = torch.randn(2, 8, 64).double().requires_grad_()
    parallel = autotp.simulate(model, 2, example_inputs=(x,))
    gradients = []
    for model.on in (True, False):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(5)
        parallel(x).square().sum().backward()
        assert parallel.divergence == 0.0
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    assert (gradients[0][0] == gradients[1][0]).all()
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(*gradients, strict=True))
    assert (x.grad == 0).sum() < x.numel() / 2  # the residual's gradient is dropped in about a quarter
    torch.manual_seed(6)
    other = parallel(x)
    torch.manual_seed(5)
    assert not torch.equal(other, parallel(x)), "nothing was dropped"


def test_on_the_meta_device_it_says_that_it_needs_weights() -> None:
    with torch.device("meta"):
        model = Net(_branch)
    with pytest.raises(autotp.CaptureError, match=r"must run it once .* give it weights"):
        autotp.plan(model, 2, example_inputs=(torch.zeros(2, 8, dtype=torch.long),))


def test_nothing_to_capture_is_an_error_still() -> None:
    model = nn.Sequential(_Calls(lambda x: x if (x > 0).any() else -x))
    with pytest.raises(autotp.CaptureError):
        autotp.plan(model, 2, example_inputs=(torch.randn(2, 8),))


def test_a_plan_of_parts_is_followed_and_one_that_does_not_fit_refused() -> None:
    ids = torch.randint(0, 101, (2, 8))
    model = Net(_branch, "in forward")
    plan = autotp.plan(model, 2, example_inputs=(ids,))
    again = partition.partition_model(model, 2, (ids,), {}, plan.weight_layouts)
    assert again.weight_layouts == plan.weight_layouts
    whole = autotp.plan(Net(), 2, example_inputs=(ids,))
    fewer = {n: layout for n, layout in whole.weight_layouts.items() if n.startswith("blocks.0.up")}
    assert partition.partition_model(model, 2, (ids,), {}, fewer).weight_layouts == fewer
    embed = {**fewer, "embed.weight": whole.weight_layouts["head.weight"]}
    with pytest.raises(autotp.PlanError, match=r"embed\.weight, which code outside"):
        partition.partition_model(model, 2, (ids,), {}, embed)


def test_esm() -> None:
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=101,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=111,
        pad_token_id=1,
        mask_token_id=2,
        position_embedding_type="rotary",
    )
    ids = torch.randint(4, 100, (2, 12))
    ids[1, 7:] = 1
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    report, plan = verified(EsmForMaskedLM(config).eval(), **inputs)
    assert report.ok, str(report)
    assert plan.share_split > 0.8, str(plan)


def test_fsmt() -> None:
    from transformers import FSMTConfig, FSMTForConditionalGeneration

    sizes = {
        "d_model": 64,
        "encoder_ffn_dim": 111,
        "decoder_ffn_dim": 111,
        "src_vocab_size": 101,
        "tgt_vocab_size": 101,
    }
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ids = torch.randint(4, 100, (2, 12))
    ids[1, 7:] = 1
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": ids.clamp(min=4), "use_cache": False}
    report, plan = verified(FSMTForConditionalGeneration(FSMTConfig(**sizes, **layers)).eval(), **inputs)
    assert report.ok, str(report)
    assert plan.graph_breaks
    assert plan.share_split > 0.8, str(plan)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(reentrant: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=101, **config))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = torch.randint(4, 100, (2, 12))
    # its norms are in float32 by name, and in a backward that runs forward again no mode of ours is around
    report, plan = verified(model.train(), input_ids=ids, labels=ids, use_cache=False, tolerance=1e-5)
    assert report.ok, str(report)
    assert len(report.gradients) == len(list(model.parameters()))
    assert bool(plan.graph_breaks) == reentrant
