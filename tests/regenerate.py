"""Write the golden texts anew: ``python -m tests.regenerate``; then review the diff by eye."""

from __future__ import annotations

from tests.golden_texts import FOLDER, TEXTS

if __name__ == "__main__":
    for name, text in TEXTS.items():
        (FOLDER / f"{name}.txt").write_text(text())
        print(FOLDER / f"{name}.txt")
