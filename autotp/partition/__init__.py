"""Models that cannot be captured whole: their largest capturable parts, and how those run.

How parts are found and chosen is changed here. It must not know which op ended a capture, nor name any model: it sees
modules, calls and errors.
"""

from autotp.partition.partition import CapturedModule, Partition, partition_model
from autotp.partition.partitioned_runtime import PartitionedRuntime
from autotp.partition.prepare import prepare

__all__ = ["CapturedModule", "Partition", "PartitionedRuntime", "partition_model", "prepare"]
