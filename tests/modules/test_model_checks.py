"""Models modified before use, calls and inputs: right, or refused by name before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import autotp
from autotp.verification.measure import relative_error
from autotp.verification.verify import compare
from tests.models import MLP, SmallGPT, make

X = torch.linspace(-1, 1, 2 * 5 * 64).view(2, 5, 64).sin()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return MLP(64, 128)


def _changed(change: Callable[[nn.Sequential], Any]) -> Callable[[], nn.Module]:
    def make_one() -> nn.Module:
        model = mlp()
        changed = change(model)
        return changed if isinstance(changed, nn.Module) and not isinstance(changed, nn.Linear) else model

    return make_one


class Odd(torch.Tensor):
    """A tensor subclass, as quantized weights are."""


def _subclass(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Odd))


def _packed(model: nn.Sequential) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gradient hook": (_changed(lambda m: m[0].weight.register_hook(lambda g: g)), "parameter 0.weight has a hook"),
    "post-accumulate hook": (
        _changed(lambda m: m[0].bias.register_post_accumulate_grad_hook(lambda p: None)),
        "parameter 0.bias has a hook",
    ),
    "torch.compile": (lambda: torch.compile(mlp()), "this OptimizedModule is compiled by torch.compile"),
    "compile of a part": (_changed(lambda m: m[2].compile()), r"^2 \(Linear\) is compiled"),
    "TorchScript": (_changed(lambda m: torch.jit.trace(m, X)), "TorchScript"),
    "DataParallel": (_changed(lambda m: nn.DataParallel(m)), "this DataParallel wraps a module"),
    "dynamic quantization": (_changed(_packed), "keeps weights packed in _packed_params|is a .* of torch.q"),
    "tensor subclass": (_changed(_subclass), "parameter 0.weight is a .*Odd"),
    "lazy module": (lambda: nn.Sequential(nn.LazyLinear(64)), "parameter 0.weight has no shape yet"),
    "sparse buffer": (_changed(lambda m: m.register_buffer("s", torch.eye(3).to_sparse())), "buffer s is a Tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("call", [autotp.parallelize, autotp.plan, autotp.simulate, autotp.verify])
def test_refused_by_name_and_left_as_it_was(name: str, call: Any) -> None:
    make_one, said = REFUSED[name]
    model = make_one()
    attributes = set(model.__dict__)
    with pytest.raises(autotp.AutoTPError, match=said):
        call(model, 1 if call is autotp.parallelize else 2, example_inputs=(X,))
    assert set(model.__dict__) == attributes


def test_hooks_for_all_modules_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *args: None)
    try:
        with pytest.raises(autotp.AutoTPError, match="registered for all modules"):
            autotp.plan(mlp(), 2, example_inputs=(X,))
    finally:
        handle.remove()
    autotp.plan(mlp(), 2, example_inputs=(X,))


class LoRA(nn.Module):
    """An adapter written by hand, around a frozen Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


class Symmetric(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


def _lora(model: nn.Sequential) -> None:
    model[0], model[2] = LoRA(model[0]), LoRA(model[2])


RIGHT: dict[str, Callable[[nn.Sequential], Any]] = {
    "LoRA": _lora,
    "weight_norm": lambda m: parametrizations.weight_norm(m[0]),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m[2]),
    "a parametrization": lambda m: m.append(
        parametrize.register_parametrization(nn.Linear(64, 64), "weight", Symmetric())
    ),
    "a forward of its own": lambda m: setattr(m[1], "forward", torch.tanh),
}


@pytest.mark.parametrize("name", RIGHT)
def test_modified_models_that_are_functions_of_tensors_are_right(name: str) -> None:
    model = mlp()
    RIGHT[name](model)
    report = autotp.verify(model, 2, example_inputs=(X,))
    assert report.ok, str(report)


HOOKS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "forward hook": (lambda m: m.register_forward_hook(lambda _, x, y: y * 3), "a forward hook"),
    "forward pre-hook": (lambda m: m.register_forward_pre_hook(lambda _, x: (x[0] * 3,)), "a forward pre-hook"),
    "full backward hook": (lambda m: m.register_full_backward_hook(lambda _, g, out: (g[0] * 3,)), "a backward hook"),
    "full backward pre-hook": (
        lambda m: m.register_full_backward_pre_hook(lambda _, g: (g[0] * 3,)), "a backward pre-hook"
    ),
    "weight_norm by hooks": (nn.utils.weight_norm, "a forward pre-hook"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_submodules_run_around_parts(name: str) -> None:
    hook, said = HOOKS[name]
    model, x = mlp().append(mlp()).double(), X.double().requires_grad_(True)
    hook(model[0])
    with pytest.warns(autotp.PartialCaptureWarning, match=rf"the model: 0 \(Linear\) has {said}"):
        parallel = autotp.simulate(model, 2, example_inputs=(x,), record=True)
    report = compare(model, parallel, (x,), {})
    assert report.ok, str(report)
    assert "input 0" in report.gradients


@pytest.mark.filterwarnings("ignore::autotp.PartialCaptureWarning")
def test_a_hook_that_only_looks_sees_every_call() -> None:
    model, seen = mlp(), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    parallel = autotp.simulate(model, 2, example_inputs=(X,))
    seen.clear()
    for run in (model, parallel, parallel):
        run(X)
    assert len(seen) == 3
    assert relative_error(seen[0], seen[1]) < 1e-5
    assert torch.equal(seen[1], seen[2])


def test_transformers_recorders_are_no_hooks_of_the_user() -> None:
    model, kwargs = make("llama")
    model(**kwargs, output_hidden_states=True)
    assert any(m._forward_hooks for m in model.modules()), "transformers has changed: the exception can go"
    assert autotp.verify(model, 2, example_inputs={**kwargs, "output_hidden_states": True}).ok


@pytest.mark.parametrize("wrong", [-1, 301])
def test_token_ids_out_of_range_raise_as_dense(wrong: int) -> None:
    model = SmallGPT(hidden=32, vocabulary=301, layers=1)
    ids = torch.zeros(2, 5, dtype=torch.long)
    parallel = autotp.simulate(model, 2, example_inputs=(ids, ids))
    bad = ids.clone()
    bad[1, 2] = wrong
    for run in (model, parallel):
        with pytest.raises(IndexError):
            run(bad, ids)
        with pytest.raises(IndexError):
            run(ids, bad)
    assert relative_error(model(ids, ids)[0], parallel(ids, ids)[0]) < 1e-5
    ids[0] = -100  # ignored
    assert relative_error(model(ids.clamp(min=0), ids)[0], parallel(ids.clamp(min=0), ids)[0]) < 1e-5


def test_wrapped_for_data_parallelism_or_distributed_already(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = {
            "DistributedDataParallel wraps a module": nn.parallel.DistributedDataParallel(mlp()),
            "parameter 0.weight is a DTensor": fully_shard(mlp(), mesh=init_device_mesh("cpu", (1,))),
        }
        for said, model in wrapped.items():
            with pytest.raises(autotp.AutoTPError, match=said):
                autotp.parallelize(model, 1, example_inputs=(X,))
    finally:
        dist.destroy_process_group()
