"""What keeps less for a backward gives torch's numbers, and keeps less."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from passes.lowering.rematerialize import gated_activation, rms_norm

Run = Callable[..., torch.Tensor]

CASES: dict[str, tuple[Run, Run, bool]] = {
    "norm": (
        lambda x, y, w: torch.rms_norm(x, (24,), w, 1e-5) * y,
        lambda x, y, w: rms_norm(x, [24], w, 1e-5) * y,
        True,
    ),
    "norm without a weight": (
        lambda x, y, w: torch.rms_norm(x, (24,), None, 1e-5) * y * w,
        lambda x, y, w: rms_norm(x, [24], None, 1e-5) * y * w,
        False,  # what follows keeps the normalized values
    ),
    "silu": (lambda x, y, w: F.silu(x) * y * w, lambda x, y, w: gated_activation(x, y, None) * w, True),
    "gelu": (lambda x, y, w: F.gelu(x) * y * w, lambda x, y, w: gated_activation(x, y, "none") * w, True),
    "gelu, approximate": (
        lambda x, y, w: F.gelu(x, approximate="tanh") * y * w,
        lambda x, y, w: gated_activation(x, y, "tanh") * w,
        True,
    ),
}


def _ran(run: Run, dtype: torch.dtype, needed: tuple[bool, ...]) -> tuple[list[Any], int]:
    """The result and gradients, and the bytes of what is kept beside the inputs."""
    torch.manual_seed(0)
    given = [torch.randn(2, 5, 24).to(dtype), torch.randn(2, 5, 24).to(dtype), torch.rand(24).to(dtype) + 0.5]
    for x, need in zip(given, needed, strict=True):
        x.requires_grad_(need)
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run(*given)
    result.backward(torch.linspace(-1, 1, result.numel(), dtype=dtype).view(result.shape).cos())
    own = {x.untyped_storage().data_ptr() for x in given}
    return [result, *(x.grad for x in given)], sum(n for at, n in kept.items() if at not in own)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "needed", [(True, True, True), (True, False, False), (False, True, True), (False, False, True)]
)
def test_values_gradients_and_what_is_kept(
    name: str, dtype: torch.dtype, needed: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["passes.lowering.rematerialize"], "WORTH", 1
    )  # the package has the pass of that name
    plain, own, less = CASES[name]
    (expected, before), (found, after) = _ran(plain, dtype, needed), _ran(own, dtype, needed)
    assert torch.equal(expected[0], found[0])
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(expected[1:], found[1:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
    assert after <= before
    if less and all(needed):
        assert after < before
