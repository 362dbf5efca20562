"""Files, functions, classes and parameter lists stay small enough to be read in one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

import autotp
from passes import ops
from tests.layout.sources import FILES, PACKAGES, tree

MOST_LINES, MOST_CODE, MOST_MEMBERS, MOST_PARAMETERS = 400, 60, 20, 8


def functions(node: ast.AST, path: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function, by its qualified name."""
    for child in ast.iter_child_nodes(node):
        name = f"{path}.{child.name}" if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else path
        if isinstance(child, ast.FunctionDef):
            yield name.lstrip("."), child
        yield from functions(child, name)


def code_lines(function: ast.FunctionDef) -> int:
    """The lines of a function's body that hold code: no docstring, comment or blank line."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return len({line for n in body for x in ast.walk(n) if hasattr(x, "lineno") for line in (x.lineno, x.end_lineno)})


def members(node: ast.ClassDef) -> int:
    """The names that a class defines: methods, properties, fields."""
    names = set()
    for n in node.body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            names.add(n.name)
        elif isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name):
            names.add(n.target.id)
        elif isinstance(n, ast.Assign):
            names |= {t.id for t in n.targets if isinstance(t, ast.Name)}
    return len(names)


def parameters(name: str, function: ast.FunctionDef) -> int:
    """How many parameters a function has, without ``self``."""
    args = function.args
    return len([*args.posonlyargs, *args.args, *args.kwonlyargs]) - ("." in name)


PUBLIC = {*autotp.__all__, *ops.__all__}
"""What users call, and the ops that graphs call, which have torch's signatures."""


@pytest.mark.parametrize("module", FILES)
def test_a_file_has_at_most_400_lines(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("module", FILES)
def test_functions_and_classes_are_small(module: str) -> None:
    long = {name: n for name, f in functions(tree(module)) if (n := code_lines(f)) > MOST_CODE}
    assert not long, "lines of code"
    classes = [n for n in ast.walk(tree(module)) if isinstance(n, ast.ClassDef)]
    wide = {c.name: n for c in classes if (n := members(c)) > MOST_MEMBERS}
    assert not wide, "members"
    many = {n: p for n, f in functions(tree(module)) if n not in PUBLIC and (p := parameters(n, f)) > MOST_PARAMETERS}
    assert not many, "parameters"


@pytest.mark.parametrize(("package", "most"), [("autotp", 8), ("passes", 3)])
def test_few_files_lie_in_the_root(package: str, most: int) -> None:
    assert len(list(FILES[package].parent.glob("*.py"))) <= most


@pytest.mark.parametrize("module", [m for m in FILES if FILES[m].name == "__init__.py" and m not in PACKAGES])
def test_each_package_has_a_face(module: str) -> None:
    """Its docstring has three lines or more, and it lists its public names."""
    assert len((ast.get_docstring(tree(module)) or "").splitlines()) >= 3
    lists = [n for n in tree(module).body if isinstance(n, (ast.Assign, ast.AnnAssign)) and "__all__" in ast.unparse(n)]
    assert lists
