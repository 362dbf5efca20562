"""Replaced forwards, and the errors that leave them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from autotp.modules.forward_patching import in_call, patch_forward, restore_forward


def _fail(args: Any, kwargs: Any) -> NoReturn:
    raise KeyError("within")


def test_an_error_that_is_being_handled_is_no_cause_of_the_next_one() -> None:
    module = nn.Linear(2, 2)
    patch_forward(module, _fail, SimpleNamespace(own_forward=None))
    with pytest.raises(KeyError) as first:
        module(torch.ones(2))
    assert in_call(first.value)
    second = ValueError("only here")
    second.__context__ = first.value  # as where it is raised while the first one is handled
    assert in_call(second)
    assert not in_call(second, first.value)
    restore_forward(module)
    module(torch.ones(2))
