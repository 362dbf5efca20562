"""The product's source files and what each imports, read without running any of it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("autotp", "passes")


def module_name(path: Path) -> str:
    """The module that a file is: a package's ``__init__.py`` is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(FILES[module].read_text())


@cache
def _names(module: str) -> frozenset[str]:
    """The names that a module imports from others at its top level: what a face offers."""
    return frozenset(a.asname or a.name for n in tree(module).body if isinstance(n, ast.ImportFrom) for a in n.names)


def imports(module: str) -> dict[str, int]:
    """The modules of ours that a module imports, anywhere in it (local and type-only imports too), with the line."""
    found: dict[str, int] = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            targets = [a.name for a in node.names if a.name in FILES]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{FILES[module]}:{node.lineno}: imports are absolute"
            source = node.module or ""
            if source.split(".")[0] not in PACKAGES:
                continue
            submodules = [f"{source}.{a.name}" for a in node.names]
            targets = [m if m in FILES and m.rpartition(".")[2] not in _names(source) else source for m in submodules]
        else:
            continue
        found |= {t: node.lineno for t in targets if t != module}
    return found


def written_order(package: str) -> list[str]:
    """The packages and files of a package from top to bottom: the first table of its docstring."""
    table = (ast.get_docstring(tree(package)) or "").partition("from top to bottom")[2].split("\n\n")[1]
    return re.findall(r"^``(\w+)`` ", table, re.MULTILINE)
