"""plain_containers: the lists, sets and dicts of plain values on modules, which a forward may branch on.

An adapter keeps the names of its merged weights in a list, and its scale in a dict; a graph holds both as they were at
capture. A list changes without a trace on the module that has it, so each call compares its content.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["PLAIN", "PlainContainers"]

PLAIN = (bool, int, float, str, type(None), torch.dtype, enum.Enum)
"""The kinds of values that are compared by value."""

_KINDS: tuple[type, ...] = (list, tuple, set, frozenset, dict)
_MOST = 256
"""The number of values in a container from which on it counts as data, and is not guarded."""
_DEEPEST = 3
_OF_TORCH = frozenset(nn.Module().__dict__)
"""The attributes of every module: parameters, submodules and hooks. They are guarded one by one."""


class _NotPlainError(Exception):
    """A value that is not plain, or too large or too deep to compare."""


def _frozen(value: Any, depth: int = 0) -> Any:
    """A hashable value that is equal for equal content.

    Raises:
        _NotPlainError: the content is not plain.
    """
    if isinstance(value, PLAIN):
        return value
    if type(value) not in _KINDS or depth == _DEEPEST or len(value) > _MOST:
        raise _NotPlainError
    if isinstance(value, dict):
        items = [(_frozen(k, _DEEPEST), _frozen(x, depth + 1)) for k, x in value.items()]
        return dict, tuple(items)
    if isinstance(value, (set, frozenset)):
        return type(value), tuple(sorted((_frozen(x, _DEEPEST) for x in value), key=repr))
    return type(value), tuple([_frozen(x, depth + 1) for x in value])


class PlainContainers:
    """The containers of plain values among attributes, and what they contain.

    Attributes:
        versioned: dicts that show each change of their content by their version.
    """

    def __init__(self) -> None:
        self.versioned: list[dict[str, Any]] = []
        self._holders: list[tuple[dict[str, Any], str]] = []
        self._live: list[Any] = []
        self._copies: list[Any] = []
        self._empty: list[Any] = []

    def add(self, attributes: dict[str, Any], skipped: frozenset[str]) -> Mapping[str, Any]:
        """Guard the containers among attributes; their frozen content by the attribute's name.

        Args:
            attributes: the dict in which a module, or a config, keeps its attributes.
            skipped: attributes to leave out.
        """
        frozen: dict[str, Any] = {}
        for key, value in attributes.items():
            if type(value) not in _KINDS or key in _OF_TORCH or key in skipped:
                continue
            try:
                frozen[key] = _frozen(value)
            except _NotPlainError:
                continue
            self._holders.append((attributes, key))
            self._watch(value)
        return frozen

    def _watch(self, value: Any) -> None:
        nested = value.values() if isinstance(value, dict) else value
        flat = all(isinstance(x, PLAIN) for x in nested)
        if isinstance(value, dict) and flat:
            self.versioned.append(value)
        elif not value and not isinstance(value, (tuple, frozenset)):
            self._empty.append(value)
        elif not (flat and isinstance(value, (tuple, frozenset))):  # those cannot change
            self._live.append(value)
            self._copies.append(copy.deepcopy(value))

    def same(self) -> bool:
        """Whether the containers that have no version contain what they contained."""
        return not any(self._empty) and self._live == self._copies

    def content(self) -> list[Any]:
        """The frozen content of all containers; of one that is no longer plain, its identity.

        Raises:
            KeyError: an attribute is gone.
        """
        return [_content(holder[key]) for holder, key in self._holders]


def _content(value: Any) -> Any:
    try:
        return _frozen(value)
    except _NotPlainError:
        return "not plain", id(value)
