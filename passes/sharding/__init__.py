"""The rewritten graph: one for all ranks, with its collectives, then one for each rank.

The way from decided layouts to nodes is changed here. Nothing here decides which weights or values are split.
"""

from passes.sharding.enter import enter
from passes.sharding.localize import localize
from passes.sharding.shard import shard

__all__ = ["enter", "localize", "shard"]
