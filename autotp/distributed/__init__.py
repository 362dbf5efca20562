"""Processes: groups, collectives, agreement of the ranks, random streams.

Backends and what ranks say to each other are changed here. It must know no models and no graphs: it moves tensors and
compares fingerprints.
"""

from autotp.distributed.agreement import Agreement
from autotp.distributed.mesh import Mesh, join
from autotp.distributed.process_context import ProcessContext
from autotp.distributed.tally import Tally

__all__ = ["Agreement", "Mesh", "ProcessContext", "Tally", "join"]
