"""names: names of modules and parameters: dotted, tied, folded over repeated blocks."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["block_of", "dotted", "folded_text", "tied_names"]


def tied_names(model: nn.Module) -> dict[str, str]:
    """For each name of a parameter the first name of the same parameter."""
    first: dict[int, str] = {}
    return {n: first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}


def block_of(path: str) -> str:
    """A module path with numbers replaced, so that repeats of a block have one name: ``layers.*.mlp``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def folded_text(text: str) -> str:
    """A text in which the module paths of repeats of a block have one name."""
    return " ".join(block_of(word) if "." in word else word for word in text.split(" "))


def dotted(*names: str) -> str:
    """Names as one path; empty ones are left out.

    >>> dotted("", "blocks.0", "scale")
    'blocks.0.scale'
    """
    return ".".join(filter(None, names))
