"""Models that cannot be captured whole: their largest capturable parts, and how those run.

How parts are found and chosen is changed here. It must not know which op ended a capture, nor name any model: it sees
modules, calls and errors.
"""

from autotp.partition.partition import Division, Part, divide
from autotp.partition.partitioned_runtime import Divided

__all__ = ["Divided", "Division", "Part", "divide"]
