"""The golden texts of the passes: see ``tests/passes/golden/README.md``."""

from __future__ import annotations

import pytest

from tests.passes import golden_lowering  # noqa: F401  # which has cases, too
from tests.passes.golden_cases import CASES, HERE


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    path = HERE / f"{name}.txt"
    assert path.exists(), "run python -m tests.passes.regenerate"
    assert CASES[name]() == path.read_text(), f"{path} is not what the pass does; python -m tests.passes.regenerate"


def test_every_text_has_a_case() -> None:
    assert {str(p.relative_to(HERE).with_suffix("")) for p in HERE.rglob("*.txt")} == set(CASES)
