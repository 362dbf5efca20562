"""One pass, one file, one public function of its name."""

from __future__ import annotations

import ast
import re

import pytest

import passes
from tests.layout.sources import FILES, tree

PASSES = re.findall(r"^``(\w+)`` +\S.*$", (passes.__doc__ or "").partition("in which they run")[2], re.MULTILINE)


def test_the_list_of_passes_is_found() -> None:
    assert len(PASSES) >= 10
    assert {"propagate", "shard", "localize"} <= set(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_one_pass_one_file_one_function_of_its_name(name: str) -> None:
    module = getattr(passes, name).__module__
    assert FILES[module].stem == name
    assert (ast.get_docstring(tree(module)) or "").startswith(f"{name}:")
    public = [n for n in tree(module).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name]
    assert len(public) == 1
    assert ast.get_docstring(public[0])
