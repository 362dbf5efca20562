"""Snapshots of a module's state: changes are seen, and undone."""

from __future__ import annotations

import torch

from autotp.arguments.snapshot import Snapshot
from tests.capture.test_side_effects import WIDTH, Inner


def test_a_snapshot_sees_and_undoes() -> None:
    inner = Inner("a flag")
    snapshot = Snapshot(inner)
    assert not snapshot.diff()
    inner.count, inner.last = 3, torch.ones(2)
    inner.list.append(torch.ones(1))
    inner.table["new"] = [1]
    inner.some.add(4)
    inner.queue.append(1)
    inner.state.hidden = 5
    del inner.longest
    inner.mean = torch.ones(WIDTH)
    found = {c.name: c for c in snapshot.diff()}
    assert set(found) == {"count", "last", "list", "table.new", "some", "queue", "state.hidden", "longest", "mean"}
    assert [found[n].has_tensors for n in ("count", "last", "list", "mean")] == [False, True, True, True]
    snapshot.restore()
    assert not snapshot.diff()
    assert (inner.count, inner.last, inner.list, inner.table, inner.some) == (0, None, [], {}, set())
    assert inner.longest == 0
    for change in found.values():
        change.apply()
    assert {c.name for c in snapshot.diff()} == set(found)
