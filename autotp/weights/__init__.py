"""Parameters, checkpoints, optimizer state and gradient norms as shards.

Change checkpoint formats and the sharding of dense tensors here. Callers pass the layouts: nothing here decides how a
weight is split.
"""

from autotp.weights.checkpoint import Source, open_checkpoint
from autotp.weights.empty_weights import empty_weights
from autotp.weights.load_checkpoint import read_shards
from autotp.weights.shard_parameters import broadcast_parameters, shard_parameters
from autotp.weights.slicing import local_part, unshard

__all__ = [
    "Source",
    "broadcast_parameters",
    "empty_weights",
    "local_part",
    "open_checkpoint",
    "read_shards",
    "shard_parameters",
    "unshard",
]
