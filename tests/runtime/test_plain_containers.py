"""Containers of plain values are compared by content; others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autotp.runtime.plain_containers import PlainContainers

NONE: frozenset[str] = frozenset()


def guarded(value: Any) -> tuple[PlainContainers, dict[str, Any]]:
    containers, attributes = PlainContainers(), {"x": value}
    assert containers.add(attributes, NONE)
    return containers, attributes


CHANGES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "a list grows": ([], lambda x: x.append("a")),
    "an item is replaced": (["a", "b"], lambda x: x.__setitem__(1, "c")),
    "an item goes": (["a", "b"], lambda x: x.pop()),
    "a set grows": ({"a"}, lambda x: x.add("b")),
    "an empty set grows": (set(), lambda x: x.add("b")),
    "a nested list grows": ({"a": ["b"]}, lambda x: x["a"].append("c")),
    "a list in a tuple grows": ((1, [2]), lambda x: x[1].append(3)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    value, change = CHANGES[name]
    containers, _ = guarded(value)
    before = containers.content()
    assert containers.same()
    assert containers.content() == before
    change(value)
    assert not containers.same()
    assert containers.content() != before
    assert hash(tuple(containers.content())), "attributes are compared as sets of pairs"


def test_flat_dicts_show_changes_by_version() -> None:
    value = {"a": 1.0}
    containers, _ = guarded(value)
    assert containers.versioned == [value]
    before = containers.content()
    value["a"] = 2.0
    assert containers.content() != before


def test_equal_content_is_equal_in_any_order_of_a_set() -> None:
    assert guarded({"a", "b", "c"})[0].content() == guarded({"c", "b", "a"})[0].content()


@pytest.mark.parametrize("value", [[torch.zeros(1)], {"a": object()}, [[[[1]]]], list(range(300)), [nn.ReLU()]])
def test_what_is_not_plain_is_left_alone(value: Any) -> None:
    containers = PlainContainers()
    assert not containers.add({"x": value, "_parameters": {}, "skipped": []}, frozenset({"skipped"}))
    assert containers.same()
    assert not containers.content()
