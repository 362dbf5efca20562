"""Functions put in the place of others."""

from __future__ import annotations

import types

from autotp.utils.patching import replace_function


def _doubled(original, *args):  # type: ignore[no-untyped-def]
    return 2 * original(*args)


def test_a_function_is_replaced_once() -> None:
    module = types.ModuleType("module")
    exec("def one(x): return x\ndef two(x): return one(x)", module.__dict__)
    original = module.one
    for _ in range(2):
        assert replace_function(module, "one", _doubled)
    assert module.two(3) == 6
    assert module.one.__name__ == "one"
    assert original(3) == 3


def test_methods_get_their_object_or_class() -> None:
    class Base:
        factor = 3

        def method(self, x: int) -> int:
            return self.factor * x

        @classmethod
        def of_class(cls, x: int) -> int:
            return cls.factor * x

    class Derived(Base):
        factor = 5

    for _ in range(2):
        assert replace_function(Base, "method", _doubled)
        assert replace_function(Base, "of_class", _doubled)
    assert (Derived().method(1), Derived.of_class(1), Base.of_class(1)) == (10, 10, 6)


def test_a_missing_function_is_told() -> None:
    assert not replace_function(types.ModuleType("module"), "one", _doubled)
