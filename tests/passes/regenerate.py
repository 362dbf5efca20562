"""Write the golden texts anew: ``python -m tests.passes.regenerate``. Read the diff before you commit it."""

from __future__ import annotations

from tests.passes import golden_lowering  # noqa: F401  # which has cases, too
from tests.passes.golden_cases import CASES, path_of, written


def main() -> None:
    """Write every text, and remove those without a case."""
    for old in written() - set(map(path_of, CASES)):
        old.unlink()
    for name, text in CASES.items():
        path = path_of(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text())


if __name__ == "__main__":
    main()
