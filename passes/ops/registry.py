"""registry: the ops by which ranks communicate, and what each does in forward and backward.

The SPMD types are those of ``spmd-types``: I invariant, R replicated with a partial gradient, V varying, P partial sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from passes.ops import collectives, norms, vocabulary

__all__ = ["COLLECTIVES", "CollectiveOp"]


class CollectiveOp(NamedTuple):
    """How ranks communicate in an op.

    Attributes:
        types: the SPMD types of its operand and of its result.
        forward: the collective of its forward, ``""`` for none.
        backward: the collective of its backward, ``""`` for none.
        group: the position of the argument that names the group, -1 for none.
    """

    types: str
    forward: str
    backward: str
    group: int

    @property
    def communicates(self) -> bool:
        """Whether ranks communicate in the op, forward or backward."""
        return bool(self.forward or self.backward)


COLLECTIVES: dict[Callable[..., Any], CollectiveOp] = {
    collectives.all_reduce: CollectiveOp("P -> I", "all_reduce", "", 1),
    collectives.all_gather: CollectiveOp("V -> I", "all_gather", "", 2),
    collectives.broadcast_from_first: CollectiveOp("V -> I", "all_reduce", "", 1),
    collectives.enter: CollectiveOp("I -> R", "", "all_reduce", 1),
    collectives.enter_overlapping: CollectiveOp("V -> V", "", "all_reduce", 2),
    norms.norm_over_shards: CollectiveOp("V -> V", "all_gather", "all_reduce", 6),
    vocabulary.vocab_parallel_cross_entropy: CollectiveOp("V -> I", "all_gather", "", 6),
    vocabulary.vocab_parallel_embedding: CollectiveOp("V -> P", "", "", -1),  # but refuses ids out of range
    collectives.start_all_reduce: CollectiveOp("P -> I", "all_reduce", "", 1),  # in lowered graphs only
    collectives.wait: CollectiveOp("P -> I", "", "", -1),  # for the collective that start_all_reduce began
}
"""All ranks run these in one order, and a pass removes none of them."""
