"""What a call gives back is made again as the class made it the first time, or by the class itself."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from autotp.capture.output_codegen import OutputFactory

CALLS = 3


def _unflatten(cls: type) -> Any:
    return lambda values, keys: cls(**dict(zip(keys, values, strict=True)))


def _everything(made: Any) -> tuple[Any, ...]:
    """All that a dict with attributes is, with its values by identity."""
    items = [(k, id(v)) for k, v in OrderedDict.items(made)]
    return type(made), items, {k: id(v) for k, v in made.__dict__.items()}


@pytest.mark.parametrize(
    ("cls", "keys", "values"),
    [
        (CausalLMOutputWithPast, ["logits", "past_key_values"], lambda: [torch.ones(2), DynamicCache()]),
        (CausalLMOutputWithPast, ["loss", "logits"], lambda: [torch.ones(()), torch.ones(2)]),
        (BaseModelOutputWithPast, ["last_hidden_state", "hidden_states"], lambda: [torch.ones(2), (torch.ones(3),)]),
        (CausalLMOutputWithPast, ["logits"], lambda: [torch.ones(2)]),
    ],
)
def test_it_is_what_the_class_would_make(cls: type, keys: list[str], values: Any) -> None:
    made = OutputFactory(_unflatten(cls), keys)
    for number in range(CALLS):
        given = values()
        one = made(*given)
        assert (made._kinds is not None) or not number
        assert _everything(one) == _everything(cls(**dict(zip(keys, given, strict=True))))
        assert one.logits is given[keys.index("logits")] if "logits" in keys else True
        assert one[0] is given[0]
        assert list(one.to_tuple()) == given or all(a is b for a, b in zip(one.to_tuple(), given, strict=True))


def test_each_is_its_own() -> None:
    made = OutputFactory(_unflatten(CausalLMOutputWithPast), ["logits"])
    one, other = (made(torch.ones(2)) for _ in range(2))
    one["loss"] = torch.ones(())
    assert other.loss is None
    assert "loss" not in other


def test_values_of_other_kinds_are_left_to_the_class() -> None:
    """A first field that is no tensor is taken apart by transformers' constructor."""
    made = OutputFactory(_unflatten(CausalLMOutputWithPast), ["loss"])
    made(torch.ones(2))
    pairs = [("logits", torch.ones(3))]
    assert list(made(pairs)) == ["logits"]
    assert list(made(torch.ones(2))) == ["loss"]


def test_one_value_in_two_places_is_left_to_the_class() -> None:
    made = OutputFactory(_unflatten(CausalLMOutputWithPast), ["loss", "logits"])
    x = torch.ones(2)
    assert made(x, x).logits is x
    assert made._kinds is None
    one = made(x, y := torch.zeros(2))
    assert one.loss is x
    assert one.logits is y


@dataclass
class _Counted(ModelOutput):
    """An output that adds something of its own."""

    logits: torch.Tensor | None = None
    rows: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.logits.shape[0]  # type: ignore[union-attr]
        self.rows = count if count > 1 else None


@dataclass
class _Set(ModelOutput):
    """An output whose attributes are not what is set."""

    logits: torch.Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value * 2)


class _Logged(OrderedDict[str, Any]):
    """A dict whose constructor does more than make it."""

    made = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _Logged.made += 1


def test_what_a_class_makes_of_values_is_left_to_it() -> None:
    made = OutputFactory(_unflatten(_Counted), ["logits"])
    assert [made(torch.ones(n)).rows for n in (1, 2, 3)] == [None, 2, 3]
    assert [f.name for f in fields(_Counted)] == ["logits", "rows"]
    made = OutputFactory(_unflatten(_Set), ["logits"])
    assert [float(made(torch.full((), n)).logits) for n in (1.0, 2.0, 3.0)] == [
        float(_Set(logits=torch.full((), n)).logits)
        for n in (1.0, 2.0, 3.0)  # type: ignore[arg-type]
    ]
    made = OutputFactory(_unflatten(_Logged), ["logits"])
    before = _Logged.made
    for _ in range(CALLS):
        made(torch.ones(2))
    assert _Logged.made == before + CALLS


def test_whatever_makes_another_kind_of_dict_is_left_to_make_it() -> None:
    made = OutputFactory(lambda values, keys: dict(zip(keys, values, strict=True)), ["x"])
    assert [list(made(torch.ones(n))) for n in (1, 2)] == [["x"], ["x"]]


def test_attributes_have_their_order() -> None:
    made = OutputFactory(_unflatten(CausalLMOutputWithPast), ["logits"])
    orders = [list(vars(made(torch.ones(2)))) for _ in range(CALLS)]
    assert orders == [list(vars(CausalLMOutputWithPast(logits=torch.ones(2))))] * CALLS  # type: ignore[arg-type]
