"""The errors autotp raises. Each says what was expected, what was found, and what to do."""

from __future__ import annotations

__all__ = [
    "AutoTPError",
    "CaptureError",
    "LaunchError",
    "LocalStateWarning",
    "MismatchError",
    "PartialCaptureWarning",
    "PlanError",
    "ProofError",
    "UnprovedWarning",
    "UntestedOptimizerWarning",
    "WeightsError",
    "WholeWeightWarning",
    "check_tp",
]


def check_tp(tp: int) -> None:
    """Raise a ValueError unless ``tp`` is a number of ranks: an integer from 1 to 62."""
    if not isinstance(tp, int) or isinstance(tp, bool) or not 1 <= tp <= 62:
        raise ValueError(f"tp must be a positive integer, 62 at most, not {tp!r}")


class AutoTPError(RuntimeError):
    """Base class of autotp's errors."""


class CaptureError(AutoTPError):
    """The model cannot be captured as one graph with the inputs given.

    Attributes:
        place: ``path:line`` of the code that cannot be captured, where it is known.
        reason: why, in a few words.
    """

    def __init__(self, message: str, *, place: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.place, self.reason = place, reason or message.splitlines()[0]


class PartialCaptureWarning(UserWarning):
    """The model was captured in parts; the code between them runs as ordinary Python, on unsplit weights."""


class WholeWeightWarning(UserWarning):
    """Weights stay unsplit on every rank because they have too few pieces for so many ranks, or cannot be split."""


class LocalStateWarning(UserWarning):
    """One rank's shards are written to a file, under the names of the dense model's tensors."""


class PlanError(AutoTPError):
    """A plan that does not fit the model or the number of ranks, or splits less than was asked for."""


class ProofError(AutoTPError):
    """A rewritten graph is not proved to be the dense model's: a mistake of autotp's, not of the model."""


class UnprovedWarning(UserWarning):
    """A rewritten graph that is not proved runs all the same, because ``check="warn"`` says so."""


class UntestedOptimizerWarning(UserWarning):
    """An optimizer could not be tried out: on shards it is right only if it works element by element."""


class LaunchError(AutoTPError):
    """No process group, and nothing to make one from."""


class MismatchError(AutoTPError):
    """The ranks differ in something in which they must agree."""


class WeightsError(AutoTPError):
    """A checkpoint that cannot be read, or that does not fit the model."""
