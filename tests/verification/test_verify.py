"""What verify compares, on real processes too, and how close it asks values to be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import autotp
from autotp.capture.capture import capture
from autotp.errors import AutoTPError
from autotp.verification.measure import Measured
from autotp.verification.report import judge
from autotp.verification.rounding import depth, rounding_error
from tests.models import SmallGPT, make
from tests.modules.test_model_checks import X, mlp


def test_on_processes() -> None:
    """Outputs, hidden values, gradients of ranks that started from other seeds, one spawn."""
    model, inputs = make("llama")
    report = autotp.verify(model, 3, example_inputs=inputs, processes=True)
    assert report.ok, str(report)
    assert len(report.gradients) == len(list(model.parameters()))
    assert report.loss is not None
    assert report.norm[0] == pytest.approx(report.norm[1], rel=1e-12)
    alone = autotp.verify(model, 3, example_inputs=inputs)
    assert report.outputs.keys() == alone.outputs.keys()
    assert report.gradients.keys() == alone.gradients.keys()


def test_a_class_that_other_processes_cannot_import() -> None:
    class Local(nn.Linear):
        pass

    with pytest.raises(AutoTPError, match="define its class in a module"):
        autotp.verify(Local(4, 4), 2, example_inputs=(torch.ones(2, 4),), processes=True)


def _measured(**changes: torch.Tensor) -> Measured:
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(3, generator=generator, dtype=torch.float64) for n in ("out", "a", "b")} | changes
    return Measured({"out": values["out"]}, {n: values[n] for n in ("a", "b")})


def _judged(found: Measured, diverging: str = "") -> Any:
    return judge(nn.Linear(1, 1), 2, _measured(), found, 1e-10, 1.0 if diverging else 0.0, diverging, ())


def test_everything_counts() -> None:
    """An output, one gradient, a gradient that is missing, ranks that differ: each alone fails a report."""
    right = _measured()
    assert _judged(right).ok
    assert not _judged(_measured(out=right.outputs["out"] + 1e-8)).ok
    assert not _judged(_measured(b=right.gradients["b"] * (1 + 1e-8))).ok
    assert not _judged(dataclasses.replace(right, gradients={"a": right.gradients["a"]})).ok
    assert not _judged(right, "hidden value h").ok
    assert "hidden value h" in str(_judged(right, "hidden value h"))


def test_the_norm_of_all_gradients_counts() -> None:
    """Every gradient a little off, each within its limit, moves the norm of all."""
    right = _measured()
    report = dataclasses.replace(_judged(right), norm=(1.0, 1.0 + 1e-6))
    assert not report.ok


def test_tolerances_follow_dtype_and_depth() -> None:
    captured = capture(SmallGPT(), (torch.zeros(2, 5, dtype=torch.long),), {})
    steps = depth([captured.graph])
    assert 15 < steps < 60
    assert depth([captured.graph] * 2) == 2 * steps
    errors = [rounding_error(t, steps, 256) for t in (torch.float64, torch.float32, torch.bfloat16)]
    assert errors == sorted(errors)
    assert errors[0] == 1e-10
    assert 1e-5 < errors[1] < 1e-3
    assert rounding_error(torch.float32, 4 * steps, 256) == pytest.approx(2 * errors[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_dtypes(dtype: torch.dtype | None) -> None:
    model, inputs = make("gpt")
    report = autotp.verify(model, 2, example_inputs=inputs, dtype=dtype)
    assert report.ok, str(report)
    assert report.dtype is (dtype or torch.float64)


def test_a_fault_is_seen_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    from passes.ops import collectives

    monkeypatch.setattr(collectives._Enter, "backward", staticmethod(lambda ctx, *g: (None, *g)))
    model, inputs = make("gpt")
    assert not autotp.verify(model, 2, example_inputs=inputs, dtype=torch.bfloat16).ok


def test_verify_compares_gradients_of_inputs() -> None:
    model = mlp()
    report = autotp.verify(model, 2, example_inputs=(X.clone().requires_grad_(True),))
    assert report.ok
    assert "input 0" in report.gradients
    assert "input 0" not in autotp.verify(model, 2, example_inputs=(X,)).gradients
