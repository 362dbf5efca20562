"""The errors autotp raises. Each says what was expected, what was found, and what to do."""

from __future__ import annotations

__all__ = ["AutoTPError", "CaptureError", "LaunchError", "MismatchError", "PlanError"]


class AutoTPError(RuntimeError):
    """Base class of autotp's errors."""


class CaptureError(AutoTPError):
    """The model cannot be captured as one graph with the inputs given."""


class PlanError(AutoTPError):
    """A plan that does not fit the model or the number of ranks."""


class LaunchError(AutoTPError):
    """No process group, and nothing to make one from."""


class MismatchError(AutoTPError):
    """The ranks differ in something in which they must agree."""
