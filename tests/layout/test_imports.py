"""Imports go downwards only, between packages as between files; the order is written in the packages' docstrings."""

from __future__ import annotations

import networkx as nx
import pytest

from tests.layout.sources import FILES, PACKAGES, imports, written_order


def graph() -> nx.DiGraph:
    """All imports between the product's modules, type-only and local ones too."""
    found = nx.DiGraph()
    found.add_nodes_from(FILES)
    found.add_edges_from(
        (module, target, {"line": line}) for module in FILES for target, line in imports(module).items()
    )
    return found


GRAPH = graph()


def test_imports_are_found() -> None:
    assert GRAPH.has_edge("autotp.parallel", "autotp.errors")
    assert GRAPH.has_edge("passes.planning.decide", "passes.planning.cost")
    assert GRAPH.number_of_edges() > 500


def test_no_files_import_each_other() -> None:
    circles = [sorted(c) for c in nx.strongly_connected_components(GRAPH) if len(c) > 1]
    assert not circles


@pytest.mark.parametrize("package", PACKAGES)
def test_the_order_lists_every_package_and_file(package: str) -> None:
    units = {m.split(".")[1] for m in FILES if m.startswith(f"{package}.")} - {"__main__"}
    assert sorted(written_order(package)) == sorted(units)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_downwards_only(package: str) -> None:
    order = {unit: i for i, unit in enumerate(written_order(package))}

    def level(module: str) -> int:
        parts = module.split(".")
        return -1 if len(parts) == 1 or parts[1] == "__main__" else order[parts[1]]

    def unit(module: str) -> tuple[str, ...]:
        return tuple(module.split(".")[:2])

    upwards = [
        f"{FILES[a]}:{data['line']} imports {b}"
        for a, b, data in GRAPH.edges(data=True)
        if a.split(".")[0] == b.split(".")[0] == package and unit(a) != unit(b) and level(a) >= level(b)
    ]
    assert not upwards


def test_passes_imports_nothing_of_autotp() -> None:
    assert not [(a, b) for a, b in GRAPH.edges if a.startswith("passes") and b.startswith("autotp")]


PROVED = ("passes.planning", "passes.sharding", "passes.rules", "passes.lowering", "passes.layouts.units",
          "passes.layouts.facts", "passes.layouts.relayout")  # fmt: skip


def test_the_proof_imports_nothing_of_the_passes_that_write_programs() -> None:
    assert not [(a, b) for a, b in GRAPH.edges if a.startswith("passes.proof") and b.startswith(PROVED)]
