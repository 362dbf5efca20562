"""Versions of dicts: a change is seen at the first look and after many, with torch's guards and without."""

from __future__ import annotations

from typing import Any

import pytest

from autotp.runtime import dict_versions
from autotp.runtime.dict_versions import DictVersions

MANY = 40


@pytest.fixture(autouse=True)
def settled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dict_versions, "_UNCHANGED", 16)
    monkeypatch.setattr(dict_versions, "_MANY", 3)


def _dicts() -> list[dict[str, Any]]:
    return [{"a": 1, "b": [2]}, {}, {"training": True}]


@pytest.fixture(params=["guards", "numbers"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numbers":
        monkeypatch.setattr(dict_versions, "_guards", lambda dicts: None)
    return str(request.param)


@pytest.mark.parametrize("looks", [0, 1, MANY])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_change_is_seen(way: str, looks: int, place: int) -> None:
    dicts = _dicts()
    seen = DictVersions(dicts)
    assert all(seen.same() for _ in range(looks))
    assert (seen._guards is not None) == (way == "guards" and looks == MANY)
    dicts[place]["training"] = False
    assert not any(seen.same() for _ in range(3))


def test_what_is_deleted_or_emptied_is_seen(way: str) -> None:
    for change in (lambda d: d.pop("a"), lambda d: d.clear(), lambda d: d.update(b=3)):
        dicts = _dicts()
        seen = DictVersions(dicts)
        assert all(seen.same() for _ in range(MANY))
        change(dicts[0])  # type: ignore[no-untyped-call]
        assert not seen.same()


def test_new_versions_take_the_change_for_how_it_was(way: str) -> None:
    dicts = _dicts()
    seen = DictVersions(dicts)
    assert all(seen.same() for _ in range(MANY))
    dicts[1]["new"] = 1
    assert not seen.same()
    assert all(DictVersions(dicts).same() for _ in range(3))


def test_without_torchs_numbers_it_is_always_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dict_versions, "dict_version", None)
    assert not DictVersions(_dicts()).same()


def test_guards_that_torch_has_changed_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed() -> Any:
        raise TypeError("incompatible function arguments")

    monkeypatch.setattr(dict_versions, "RootGuardManager", changed)
    dicts = _dicts()
    seen = DictVersions(dicts)
    assert all(seen.same() for _ in range(MANY))
    dicts[0]["a"] = 2
    assert not seen.same()


def test_what_another_thread_sets_while_guards_are_made_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    dicts, make = _dicts(), dict_versions._guards

    def slowly(of: Any) -> Any:
        dicts[0]["a"] = 2
        return make(of)

    monkeypatch.setattr(dict_versions, "_guards", slowly)
    seen = DictVersions(dicts)
    assert [seen.same() for _ in range(MANY)] == [True] * 15 + [False] * (MANY - 15)


def test_guards_are_not_made_for_few_dicts() -> None:
    seen = DictVersions(_dicts()[:2])
    assert all(seen.same() for _ in range(MANY))
    assert seen._guards is None
