"""names: dotted, tied and folded names of modules and parameters; to fold is to give repeated blocks one name."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["block_of", "dotted", "folded_text", "tied_names"]


def tied_names(model: nn.Module) -> dict[str, str]:
    """From each name of a parameter to the first name of that parameter."""
    first: dict[int, str] = {}
    return {n: first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}


def block_of(path: str) -> str:
    """A module path with its numbers replaced, so that repeated blocks have one name: ``layers.*.mlp``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def folded_text(text: str) -> str:
    """A text with its module paths changed by :func:`block_of`."""
    return " ".join(block_of(word) if "." in word else word for word in text.split(" "))


def dotted(*names: str) -> str:
    """The names as one path, without empty ones.

    >>> dotted("", "blocks.0", "scale")
    'blocks.0.scale'
    """
    return ".".join(filter(None, names))
