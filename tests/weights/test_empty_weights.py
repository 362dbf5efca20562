"""Models without weights: they have their ties, buffers and attributes."""

from __future__ import annotations

import torch
from torch import nn

import autotp
from tests.models import SmallGPT, make


def test_models_without_weights_have_their_ties_buffers_and_attributes() -> None:
    with autotp.empty_weights():
        model = SmallGPT()
        batch = nn.BatchNorm1d(4)
    assert model.head.weight is model.wte.weight
    assert model.wte.weight.is_meta
    assert batch.running_var.tolist() == [1.0] * 4
    assert not nn.Linear(2, 2).weight.is_meta, "afterwards all is as before"
    shared = nn.Parameter(torch.ones(3), requires_grad=False)
    shared.tag = "kept"
    with autotp.empty_weights():
        model = nn.ParameterList([shared, shared, nn.Parameter(torch.ones(3))])
    assert model[0] is model[1]
    assert model[2] is not model[0]
    assert (model[0].tag, model[0].requires_grad) == ("kept", False)


def test_a_transformers_model_without_weights_has_its_buffers() -> None:
    dense, _ = make("llama")
    with autotp.empty_weights():
        model, _ = make("llama")
    buffers = dict(dense.named_buffers())
    assert buffers
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
