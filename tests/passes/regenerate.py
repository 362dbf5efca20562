"""Write the golden texts anew: ``python -m tests.passes.regenerate``. Read the diff before you commit it."""

from __future__ import annotations

from tests.passes.golden import all_cases, path_of, written


def main() -> None:
    """Write every text, and remove those without a case."""
    cases = all_cases()
    for old in written() - set(map(path_of, cases)):
        old.unlink()
    for name, text in cases.items():
        path = path_of(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text())


if __name__ == "__main__":
    main()
