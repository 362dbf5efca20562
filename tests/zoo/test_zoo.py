"""The zoo's record, and a sample of it on every run; ``python -m tests.zoo --check`` runs all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from tests.zoo.architectures import architectures
from tests.zoo.measure import TPS, measure
from tests.zoo.table import TABLE, load, text, worse

SAMPLE = ["causal/falcon", "causal/olmo2", "causal/gptj", "causal/qwen3", "masked/bert", "seq2seq/t5"]


def test_every_architecture_has_a_row() -> None:
    found, pinned = {str(a) for a in architectures()}, Path(__file__, "../../../constraints.txt").resolve().read_text()
    assert found <= set(load())
    if f"transformers=={transformers.__version__}\n" in pinned:  # another version has others
        assert found == set(load())


def test_the_table_is_that_of_the_rows() -> None:
    assert TABLE.read_text() == text(sorted(load().values(), key=lambda row: row.name))


def test_nothing_recorded_was_computed_wrong() -> None:
    wrong = {row.name: at.error for row in load().values() for at in row.at.values() if "outputs off" in at.error}
    assert not wrong


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
