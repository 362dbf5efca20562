"""The options of lowering: their old names are accepted with a warning."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

from passes import Lowering

RENAMED = {
    "group": "grouped_query",
    "together": "fuse_adjacent",
    "lean": "rematerialize",
    "grow": "cache_in_place",
    "bind": "direct_calls",
}
OPTIONS = [f.name for f in dataclasses.fields(Lowering)]


def test_the_options_are_the_new_names() -> None:
    assert not set(RENAMED) & set(OPTIONS)
    assert set(RENAMED.values()) <= set(OPTIONS)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_in_the_constructor_sets_the_new_option(old: str) -> None:
    new = RENAMED[old]
    with pytest.warns(DeprecationWarning, match=rf"Lowering\({old}=\.\.\.\) is now Lowering\({new}=\.\.\.\)"):
        lowering = Lowering(**{old: False})
    assert lowering == Lowering(**{new: False})
    assert lowering != Lowering()
    assert hash(lowering) == hash(Lowering(**{new: False}))
    assert f"{new}=False" in repr(lowering)


@pytest.mark.parametrize("old", RENAMED)
@pytest.mark.parametrize("value", [True, False])
def test_an_old_attribute_reads_the_new_option(old: str, value: bool) -> None:
    lowering = Lowering(**{RENAMED[old]: value})
    with pytest.warns(DeprecationWarning, match=RENAMED[old]):
        assert getattr(lowering, old) is value


@pytest.mark.parametrize("old", RENAMED)
def test_replace_takes_an_old_name(old: str) -> None:
    """``dataclasses.replace`` passes all options on under their new names, too: the old name must win."""
    with pytest.warns(DeprecationWarning, match=RENAMED[old]):
        lowering = dataclasses.replace(Lowering(), **{old: False})
    assert lowering == Lowering(**{RENAMED[old]: False})


def test_new_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowering = Lowering(fold=False, **dict.fromkeys(RENAMED.values(), False))
        replaced = dataclasses.replace(Lowering(), fold=False, **dict.fromkeys(RENAMED.values(), False))
        assert lowering == replaced
        assert not any(getattr(lowering, name) for name in ("fold", *RENAMED.values()))
        assert not any(getattr(Lowering.none(), name) for name in OPTIONS)
        assert Lowering.none() == Lowering(*[False] * len(OPTIONS))


def test_a_warning_names_the_file_of_the_caller() -> None:
    """Python shows a DeprecationWarning by default only where it names the user's own script."""
    with pytest.warns(DeprecationWarning, match="direct_calls") as constructed:
        lowering = Lowering(bind=False)
    with pytest.warns(DeprecationWarning, match="direct_calls") as read:
        _ = lowering.bind
    assert [r.filename for r in (*constructed, *read)] == [__file__] * 2


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(TypeError, match="unknown"):
        Lowering(unknown=True)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match=r"Lowering has no option 'unknown'; it has fold, causal, .*repeat"):
        _ = Lowering().unknown
    with pytest.raises(dataclasses.FrozenInstanceError):
        Lowering().fold = False  # type: ignore[misc]
