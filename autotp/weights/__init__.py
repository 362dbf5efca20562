"""Parameters, checkpoints, optimizer state and gradient norms as shards.

Formats of checkpoints and what dense tensors are cut by are changed here. Layouts are handed in: nothing here decides
how a weight is split.
"""

from autotp.weights.checkpoint import Source, opened
from autotp.weights.empty_weights import empty_weights
from autotp.weights.load_checkpoint import read
from autotp.weights.shard_parameters import share_weights
from autotp.weights.slicing import joined, local_part

__all__ = ["Source", "empty_weights", "joined", "local_part", "opened", "read", "share_weights"]
