"""shard_tensor: a rank's shard in a state dict, which knows of which dense tensor and of which indices it is.

To all ordinary code it is the plain tensor that it shares memory with, of the shard's shape. Three kinds of code learn
more. ``load_state_dict`` refuses another rank's shard. ``torch.save`` writes rank and indices with the values.
``torch.distributed.checkpoint`` sees the chunks of the dense tensor, by the methods of its checkpointable protocol, and
so loads them into any other sharding.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from autotp.errors import LocalStateWarning
from passes import IndexSet, Shards

__all__ = ["Owner", "ShardTensor", "Sharding", "plain"]


class Owner(Protocol):
    """The parallelized model that shards are of."""

    def gather(self, local: torch.Tensor, shards: Mapping[int, Shards]) -> torch.Tensor:
        """The dense tensor of which each rank holds ``local``, by its split dims. Collective."""
        ...


@dataclass(frozen=True)
class Sharding:
    """The indices that a rank holds of a dense tensor.

    Attributes:
        rank: the rank.
        dim: the dim that is split.
        shards: the indices of that dim that each rank holds.
    """

    rank: int
    dim: int
    shards: Shards

    @property
    def tp(self) -> int:
        """The number of ranks."""
        return len(self.shards.ranks)

    @cached_property
    def owned(self) -> tuple[tuple[int, int], ...]:
        """The runs of indices that no lower rank holds: those that this rank writes into checkpoints."""
        return self.shards.owned.ranks[self.rank].runs

    @cached_property
    def chunks(self) -> dict[int, tuple[int, int]]:
        """The runs that this rank holds: by its first index the run's first position in the shard, and its length.

        A run is cut where a lower rank's indices begin or end, so that each of them is owned or not as a whole.
        """
        own = self.shards.ranks[self.rank]
        mine = set(self.owned)
        others = IndexSet.of([i for i in own.indices if not any(a <= i < b for a, b in mine)])
        return {a: (own.positions(IndexSet(((a, b),))).runs[0][0], b - a) for a, b in sorted((*mine, *others.runs))}

    def dense_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the dense tensor of which this rank holds a shard of ``shape``."""
        return torch.Size([*shape[: self.dim], self.shards.size, *shape[self.dim + 1 :]])

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        return self

    def __str__(self) -> str:
        runs = self.shards.ranks[self.rank].runs
        indices = ", ".join(f"{a}:{b}" for a, b in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
        return f"rank {self.rank} of tp={self.tp} (indices {indices} of {self.shards.size} in dim {self.dim})"


class ShardTensor(torch.Tensor):
    """A rank's shard of a dense tensor, in a state dict of a parallelized model or of its optimizer.

    Shape, dtype and values are the shard's. Every operation gives plain tensors, but copies of the whole shard
    (``clone``, ``cpu``, ``to``, ``detach``, ``contiguous``, ``copy.deepcopy``) stay shards.

    Attributes:
        sharding: the indices that the rank holds.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    sharding: Sharding
    _owner: weakref.ref[Owner] | None

    @staticmethod
    def of(tensor: torch.Tensor, sharding: Sharding, owner: weakref.ref[Owner] | None = None) -> ShardTensor:
        """A tensor's shard of the same memory.

        Args:
            tensor: the rank's shard; its dtype and shape are any.
            sharding: the indices that it has.
            owner: refers to the model, as long as it lives.
        """
        shard: ShardTensor = torch.Tensor._make_subclass(ShardTensor, tensor.detach(), False)
        shard.sharding, shard._owner = sharding, owner
        return shard

    def full(self) -> torch.Tensor:
        """The dense tensor. Collective: all ranks of the model must call it.

        Raises:
            RuntimeError: the shard was loaded from a file, or its model is gone.
        """
        owner = self._owner() if self._owner is not None else None
        if owner is None:
            raise RuntimeError(f"the shard of {self.sharding} is of no model that is alive: load it into its model")
        return owner.gather(plain(self), {self.sharding.dim: self.sharding.shards})

    def _like(self, tensor: torch.Tensor) -> ShardTensor:
        return ShardTensor.of(tensor, self.sharding, self._owner)

    def clone(self, *args: Any, **kwargs: Any) -> ShardTensor:
        """A copy; it stays a shard."""
        return self._like(plain(self).clone(*args, **kwargs))

    def detach(self) -> ShardTensor:
        """The same shard."""
        return self._like(plain(self))

    def contiguous(self, *args: Any, **kwargs: Any) -> ShardTensor:
        """The shard in contiguous memory."""
        return self._like(plain(self).contiguous(*args, **kwargs))

    def cpu(self, *args: Any, **kwargs: Any) -> ShardTensor:
        """The shard on the CPU."""
        return self._like(plain(self).cpu(*args, **kwargs))

    def cuda(self, *args: Any, **kwargs: Any) -> ShardTensor:
        """The shard on a GPU."""
        return self._like(plain(self).cuda(*args, **kwargs))

    def to(self, *args: Any, **kwargs: Any) -> ShardTensor:
        """The shard with another dtype or on another device."""
        return self._like(plain(self).to(*args, **kwargs))

    def new_empty(self, size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """A tensor without values; a shard where torch's asynchronous checkpoints ask for one to copy this one into."""
        tensor: torch.Tensor = plain(self).new_empty(size, *args, **kwargs)
        return self._like(tensor) if tensor.shape in ((), self.shape) else tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardTensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        copied: ShardTensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        _warn_of_local_state(self.sharding)
        sharding = self.sharding
        ranks = tuple(s.runs for s in sharding.shards.ranks)
        return _rebuild, (plain(self), sharding.rank, sharding.dim, sharding.shards.size, ranks)

    def _chunk(self, first: int, count: int) -> ChunkStorageMetadata:
        dim = self.sharding.dim
        offsets = [first if d == dim else 0 for d in range(self.dim())]
        sizes = [count if d == dim else n for d, n in enumerate(self.shape)]
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """The chunks of the dense tensor that this rank holds."""
        return [self._chunk(first, count) for first, (_, count) in self.sharding.chunks.items()]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        """The chunks of the dense tensor that this rank writes: those that no lower rank holds."""
        size, properties = self.sharding.dense_shape(self.shape), TensorProperties.create_from_tensor(plain(self))
        chunks = [self._chunk(a, b - a) for a, b in self.sharding.owned]
        return [
            WriteItem(
                MetadataIndex(fqn, c.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(c, properties, size)
            )
            for c in chunks
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """The part of this rank's memory that is a chunk of the dense tensor."""
        if index.offset is None:
            return plain(self)
        start, count = self.sharding.chunks[index.offset[self.sharding.dim]]
        return plain(self).narrow(self.sharding.dim, start, count)


def plain(tensor: Any) -> Any:
    """A shard as the plain tensor that it is in memory; any other value as it is."""
    return torch.Tensor.as_subclass(tensor, torch.Tensor) if isinstance(tensor, ShardTensor) else tensor


def _rebuild(
    tensor: torch.Tensor, rank: int, dim: int, size: int, ranks: tuple[tuple[tuple[int, int], ...], ...]
) -> ShardTensor:
    """A shard that was pickled."""
    indices = tuple(IndexSet(tuple((a, b) for a, b in runs)) for runs in ranks)
    return ShardTensor.of(tensor, Sharding(rank, dim, Shards(size, indices)))


torch.serialization.add_safe_globals([_rebuild])  # torch.load(weights_only=True) may make shards

_warned: set[int] = set()


def _warn_of_local_state(sharding: Sharding) -> None:
    """Warn, once a process, that what is pickled is one rank's."""
    if not _warned:
        _warned.add(sharding.rank)
        warnings.warn(
            f"the state_dict() of a parallelized model is pickled: it holds 1/{sharding.tp} of each split tensor. Only "
            f"rank {sharding.rank} of tp={sharding.tp} can load it, so every rank has to write a file of its own. For "
            "one checkpoint of the dense model, call autotp.save(model, folder) on all ranks",
            LocalStateWarning,
            stacklevel=3,
        )
