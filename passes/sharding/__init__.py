"""The rewritten graph: one for all ranks, with its collectives, then one for each.

How a decided layout becomes nodes is changed here. It must not decide what is split.
"""

from passes.sharding.enter import enter
from passes.sharding.localize import localize
from passes.sharding.shard import shard

__all__ = ["enter", "localize", "shard"]
