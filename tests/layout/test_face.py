"""The public names of autotp: each is imported when it is first used, and is where type checkers are told it is."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import autotp
from autotp.plans.make_plan import make_plan
from tests.layout.sources import FILES, ROOT, tree


def test_importing_autotp_imports_no_torch() -> None:
    script = "import sys, autotp; dir(autotp); sys.exit('torch' in sys.modules or 'passes' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_every_public_name_has_a_source_and_a_type() -> None:
    (block,) = (n for n in tree("autotp").body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        typed |= {a.asname or a.name: (node.module, a.name) for a in node.names}
    sources = {}
    for name, source in autotp._SOURCES.items():
        module, _, attribute = source.partition(":")
        sources[name] = (module, attribute or name)
    assert typed == sources
    assert set(sources) == set(autotp.__all__)
    assert set(autotp.__all__) <= set(dir(autotp))


@pytest.mark.parametrize("name", autotp.__all__)
def test_public_names_can_be_used(name: str) -> None:
    assert getattr(autotp, name) is getattr(autotp, name)
    assert f"autotp.{name}" not in FILES, "a submodule would take the name's place when it is imported"


def test_names_that_are_imported_late_are_the_real_ones() -> None:
    from autotp import plan

    assert autotp.plan is plan is make_plan
    assert autotp.errors.PlanError is autotp.PlanError
    for name in ("nothing", "_private", "__wrapped__", "__main__"):
        assert not hasattr(autotp, name)
