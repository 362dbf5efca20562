"""inert_pickle: what a pickle holds, without importing or calling anything that it names.

A pickle is a program, and one from elsewhere may call any function. Here each class or function is a name only, and
each call of one a record of its arguments, from which the caller takes what it knows.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

__all__ = ["Global", "Made", "unpickle"]


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names."""

    name: str


@dataclass(eq=False)
class Made:
    """An object that a pickle makes by calling a class or function. Here it is not called."""

    maker: str
    args: tuple[Any, ...]
    state: Any = None

    def field(self, name: str) -> Any:
        """An attribute of the object that would be made; None if it has none of this name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


Maker = Callable[..., Any]
_BUILT_IN: dict[str, Maker] = {
    "collections.OrderedDict": lambda *pairs: dict(*pairs),
    "torch.Size": lambda sizes=(): tuple(sizes),
    "builtins.set": lambda items=(): tuple(items),
}


class _Inert(pickle._Unpickler):
    """Python's own unpickler, in whose place of each import and call a record is made.

    It is the one written in Python: the one in C makes room for as many values as a damaged pickle says.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: Any
    append: Any

    def __init__(
        self, data: bytes, known: Mapping[str, Maker], refuse: Callable[[str], None] | None, load: Maker | None
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._known, self._refuse, self._load_persistent = {**_BUILT_IN, **known}, refuse, load

    def find_class(self, module: str, name: str) -> Any:
        """A dtype, or the name of a class or function."""
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if self._refuse is not None:
            self._refuse(f"{module}.{name}")
        return Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """The value that the pickle refers to by a mark."""
        if self._load_persistent is None:
            raise pickle.UnpicklingError("it refers to something outside of it")
        return self._load_persistent(pid)

    def get_extension(self, code: int) -> None:
        """Refuse names that stand as numbers."""
        raise pickle.UnpicklingError(f"it names something by the number {code}")

    def _made(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Global):
            raise pickle.UnpicklingError("it calls what is neither a class nor a function")
        known = self._known.get(function.name)
        return known(*args) if known is not None else Made(function.name, tuple(args))

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._made(klass, args))

    def _call(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], args)

    def _call_with_names(self) -> None:
        self.stack.pop()
        self._call()

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Made):
            self.stack[-1].state = state

    def _byte_array(self) -> None:
        raise pickle.UnpicklingError("it holds a bytearray")

    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = _call
    dispatch[pickle.NEWOBJ_EX[0]] = _call_with_names
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.BYTEARRAY8[0]] = _byte_array


def unpickle(
    data: bytes,
    known: Mapping[str, Maker] | None = None,
    refuse: Callable[[str], None] | None = None,
    persistent: Maker | None = None,
) -> Any:
    """What a pickle holds: plain Python values, dtypes, :class:`Global` and :class:`Made`.

    Args:
        data: the pickle.
        known: functions to call in place of those that the pickle names, by the pickle's name for each.
        refuse: is given each name of a class or function, and may raise.
        persistent: returns what a mark in the pickle stands for.

    Raises:
        Exception: of any class, if the pickle is damaged.
    """
    return _Inert(data, known or {}, refuse, persistent).load()
