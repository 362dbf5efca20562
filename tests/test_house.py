"""The rules of the house, held by reading the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import passes

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for package in ("passes", "autotp") for p in (ROOT / package).rglob("*.py"))
PASSES = re.findall(r"^``(\w+)`` ", passes.__doc__ or "", re.MULTILINE)


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "passes").rglob("*.py")), ids=str)
def test_passes_imports_nothing_of_autotp(path: Path) -> None:
    assert not {m for m in imported(path) if m.split(".")[0] in ("autotp", "transformers", "tests")}


WRITERS = ("passes.planning", "passes.sharding", "passes.rules", "passes.lowering", "passes.layouts.units",
           "passes.layouts.facts", "passes.layouts.relayout")  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "passes" / "proof").glob("*.py")), ids=str)
def test_the_proof_imports_nothing_of_the_passes_that_write_programs(path: Path) -> None:
    assert not [m for m in imported(path) if m.startswith(WRITERS)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def test_the_list_of_passes_is_found() -> None:
    assert len(PASSES) >= 10
    assert {"propagate", "shard", "localize"} <= set(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_one_pass_one_file_one_function_of_its_name(name: str) -> None:
    module = getattr(passes, name).__module__
    path = ROOT / (module.replace(".", "/") + ".py")
    assert path.stem == name
    tree = ast.parse(path.read_text())
    assert (ast.get_docstring(tree) or "").startswith(f"{name}:")
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name]
    assert len(public) == 1
    assert ast.get_docstring(public[0])
