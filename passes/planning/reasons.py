"""reasons: why a weight stays whole."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Reason"]


@dataclass(frozen=True)
class Reason:
    """Why a weight stays whole.

    Attributes:
        text: for a person.
        limit: the most ranks for which there are pieces to split it into, where there are too few of them for
            these; 1 if it has no pieces; None if every rank needs all of it, or splitting it does not pay.
    """

    text: str
    limit: int | None = None
