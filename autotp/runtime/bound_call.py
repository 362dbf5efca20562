"""bound_call: a call matched to a compiled graph: the tensors and objects that the graph takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autotp.program.rank_graph import RankGraph
from autotp.program.sharded_program import ShardedProgram
from autotp.weights.slicing import own_part
from passes import Layout

__all__ = ["BoundCall", "CacheEntry"]


@dataclass(eq=False)
class CacheEntry:
    """A graph of a module.

    Attributes:
        number: its number in the module's graph cache.
        program: the graph, for all ranks.
        graph: this rank's graph; None before the first call on this rank.
    """

    number: int
    program: ShardedProgram
    graph: RankGraph | None = None


@dataclass(slots=True)
class BoundCall:
    """A call and the graph that it fits.

    Attributes:
        entry: the graph.
        tensors: the tensors among the arguments.
        objects: the objects among the arguments, which the call may mutate.
        sizes: the sizes that the graph does not take for constants.
        unsharded: the layouts of tensors, by position, that were given dense and of which the graph takes shards.
    """

    entry: CacheEntry
    tensors: Sequence[torch.Tensor]
    objects: Sequence[Any]
    sizes: tuple[int, ...]
    unsharded: Mapping[int, Layout] | None = None

    def local(self, rank: int) -> Sequence[torch.Tensor]:
        """The tensors as a rank's graph takes them."""
        if not self.unsharded:
            return self.tensors
        tensors = list(self.tensors)
        for i, layout in self.unsharded.items():
            tensors[i] = own_part(tensors[i], layout.dims, rank)
        return tensors
