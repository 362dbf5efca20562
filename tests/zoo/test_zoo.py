"""A sample of the zoo on every run; ``python -m tests.zoo --check`` runs all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.zoo.architectures import architectures
from tests.zoo.measure import TPS, measure
from tests.zoo.table import load, worse

SAMPLE = ["causal/falcon", "causal/olmo2", "causal/gptj", "causal/qwen3", "masked/bert", "seq2seq/t5"]


def test_rows_are_of_architectures_that_there_are() -> None:
    assert {str(a) for a in architectures()} >= set(load())


@pytest.mark.parametrize("name", SAMPLE)
def test_no_row_of_a_sample_is_worse_than_recorded(name: str) -> None:
    (architecture,) = (a for a in architectures() if str(a) == name)
    row = measure(architecture, tps=(3, 4))
    assert not worse(load()[name], row)
    assert all(at.full for at in row.at.values()), row


def test_what_gets_worse_is_noticed() -> None:
    was = load()["causal/gptj"]
    assert not worse(was, was)
    at = was.at["4"]
    for change in (
        replace(at, ok=False, error="outputs off by 1.0"),
        replace(at, share=at.share - 0.2),
        replace(at, vocabulary=False),
        replace(at, forward=at.forward + 1),
        replace(at, backward=at.backward + 1),
    ):
        assert len(worse(was, replace(was, at={**was.at, "4": change}))) == 1
    assert worse(was, replace(was, at={}, dense_error="ImportError"))
    assert len(was.at) == len(TPS)
