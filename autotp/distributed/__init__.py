"""Processes: groups, collectives, agreement of the ranks, random streams.

Change backends and the messages between ranks here. The package knows no models and no graphs: it moves tensors and
compares fingerprints.
"""

from autotp.distributed.agreement import Agreement
from autotp.distributed.mesh import Mesh, join
from autotp.distributed.process_context import ProcessContext
from autotp.distributed.tally import Tally

__all__ = ["Agreement", "Mesh", "ProcessContext", "Tally", "join"]
