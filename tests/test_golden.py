"""The golden texts hold: what each pass does to a small graph, as a reader sees it."""

from __future__ import annotations

import pytest

from tests.golden_texts import FOLDER, TEXTS


@pytest.mark.parametrize("name", TEXTS)
def test_golden(name: str) -> None:
    path = FOLDER / f"{name}.txt"
    assert TEXTS[name]() == path.read_text(), f"if this is meant: python -m tests.regenerate, and review {path.name}"


def test_every_pass_has_one() -> None:
    import passes

    functions = [n for n in passes.__all__ if n.islower()]
    assert {n.split("_")[0] for n in TEXTS} == set(functions)
    assert {p.stem for p in FOLDER.glob("*.txt")} == set(TEXTS)
