"""The golden texts of the passes: see ``tests/passes/README.md``."""

from __future__ import annotations

import pytest

from tests.passes.golden import all_cases, path_of, written

CASES = all_cases()


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    path = path_of(name)
    assert path.exists(), "run python -m tests.passes.regenerate"
    assert CASES[name]() == path.read_text(), f"{path} is not what the pass does; python -m tests.passes.regenerate"


def test_every_text_has_a_case() -> None:
    assert written() == set(map(path_of, CASES))
