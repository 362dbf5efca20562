"""Whether an optimizer reads other elements, found by trying it out: in one process, without a model."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim import optimizer as torch_optimizer
from torch.utils import _pytree as pytree

from autotp.weights.optimizer_probe import UntestableError, moves_parts_otherwise
from tests.weights import optimizers
from tests.weights.optimizers import ELEMENTWISE, READERS, Simple


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes or ((9, 8), (11, 5))]
    for p in made:
        p.grad = torch.ones_like(p)
    return made


def probe(optimizer: torch.optim.Optimizer, dims: tuple[int, ...] = (0, 1), group: int = 0) -> int | None:
    own = optimizer.param_groups[group]
    return moves_parts_otherwise(optimizer, own, own["params"][-1], dims)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_ones_pass_before_and_after_a_step(name: str) -> None:
    optimizer = ELEMENTWISE[name](parameters())
    assert probe(optimizer) is None
    optimizer.step()
    assert probe(optimizer) is None


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("shape", [(9,), (3, 4, 5), (2, 3, 2, 3, 2)], ids=str)
def test_elementwise_ones_pass_with_any_number_of_dims(name: str, shape: tuple[int, ...]) -> None:
    assert probe(ELEMENTWISE[name](parameters(shape)), tuple(range(len(shape)))) is None


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", READERS)
def test_readers_of_matrices_are_found_by_each_dim(name: str, dim: int) -> None:
    assert probe(READERS[name](parameters()), (dim,)) == dim


def test_a_reader_of_rows_is_right_where_rows_are_whole() -> None:
    optimizer = optimizers.ByRows(parameters())
    assert probe(optimizer, (0,)) is None
    assert probe(optimizer, (0, 1)) == 1


def test_matrices_in_a_stack_may_be_dealt_out() -> None:
    class Stacked(Simple):
        def update(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
            return p.grad / p.grad.norm(dim=(-2, -1), keepdim=True)

    optimizer = Stacked(parameters((4, 5, 6)))
    assert [probe(optimizer, (dim,)) for dim in range(3)] == [None, 1, 2]


def test_each_group_has_its_options() -> None:
    first, second = parameters()
    optimizer = optimizers.Lamb([{"params": [first], "trust": False}, {"params": [second]}])
    assert [probe(optimizer, group=i) for i in range(2)] == [None, 0]


def test_biases_of_adafactor_are_not_factored_but_bounded_by_their_norm() -> None:
    assert probe(torch.optim.Adafactor(parameters((9,))), (0,)) == 0


def test_a_scheduler_and_a_scaler_do_not_matter() -> None:
    optimizer = torch.optim.AdamW(parameters(), lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # the first rate is 0
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    assert "step" in vars(optimizer)
    assert probe(optimizer) is None
    assert scheduler.get_last_lr() == [0.0]


class TestUntestable:
    def test_an_error_inside(self) -> None:
        with pytest.raises(UntestableError, match="ValueError: a tensor that I do not know"):
            probe(optimizers.Picky(parameters(), 1))

    def test_one_that_needs_sparse_gradients(self) -> None:
        with pytest.raises(UntestableError, match="SparseAdam does not support dense gradients"):
            probe(torch.optim.SparseAdam(parameters()))

    def test_one_that_moves_nothing(self) -> None:
        class Idle(Simple):
            def update(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
                return torch.zeros_like(p)

        with pytest.raises(UntestableError, match="does not move"):
            probe(Idle(parameters()))

    def test_large_tensors_outside_the_state_are_not_copied(self) -> None:
        class Large(Simple):
            def __init__(self, params: Any, size: int) -> None:
                super().__init__(params)
                self.table = torch.zeros(size)

        assert probe(Large(parameters(), 1 << 10)) is None
        optimizer = Large(parameters(), 1 << 21)
        with pytest.raises(UntestableError, match="2097152 elements"):
            probe(optimizer)

    def test_parameters_without_values(self) -> None:
        with pytest.raises(UntestableError, match="no values"):
            probe(torch.optim.Adam([nn.Parameter(torch.zeros(3, 3, device="meta"))]))


@pytest.fixture
def hook_calls() -> Iterator[list[str]]:
    """Calls of hooks that a user has registered for all optimizers."""
    calls: list[str] = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda *args: calls.append("before")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *args: calls.append("after")),
    ]
    yield calls
    for handle in handles:
        handle.remove()


def _everything(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Copies of all that an optimizer keeps."""
    left_out = ("state", "method", "inner", "names")
    values = {k: v for k, v in vars(optimizer).items() if k not in left_out and "hook" not in k}
    return pytree.tree_leaves(copy.deepcopy((values, [dict(state) for state in optimizer.state.values()])))


def _equal(found: list[Any], expected: list[Any]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def _generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", [*ELEMENTWISE, *READERS])
def test_the_optimizer_is_as_it_was(name: str, stepped: bool, hook_calls: list[str]) -> None:
    made = parameters()
    optimizer = (ELEMENTWISE | READERS)[name](made)
    if stepped:
        optimizer.step(lambda: torch.zeros(()))
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: called.append("own"))
    before, generators, attributes = (
        _everything(optimizer),
        _generators(),
        {k: id(v) for k, v in vars(optimizer).items()},
    )
    hook_calls.clear()
    tables = [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
    probe(optimizer)
    assert tables[0] is torch_optimizer._global_optimizer_pre_hooks
    assert tables[1] is torch_optimizer._global_optimizer_post_hooks
    assert hook_calls == called == []
    assert _generators() == generators
    assert {k: id(v) for k, v in vars(optimizer).items()} == attributes
    assert _equal(_everything(optimizer), before)
    for p, fresh in zip(made, parameters()):
        assert p.grad is not None
        assert stepped or (torch.equal(p, fresh) and torch.equal(p.grad, fresh.grad))
    optimizer.step(lambda: torch.zeros(()))
    assert called == ["own"], "negative control: hooks do see real steps"
    assert hook_calls[0] == "before"
    assert len(after := _everything(optimizer)) != len(before) or not _equal(after, before)
