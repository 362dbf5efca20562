"""communicators: collectives over torch.distributed; NCCL and gloo are called here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

__all__ = ["ProcessCommunicator"]


@dataclass
class SoloCommunicator:
    """A group of one."""

    rank: int = 0
    size: int = 1
    by_host: bool = False

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    all_reduce_ = all_reduce

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: tensor

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return [tensor]


@dataclass
class ProcessCommunicator:
    """One process's end of a process group; ``missing`` returns the error to raise where a collective fails."""

    group: dist.ProcessGroup
    rank: int
    size: int
    missing: Callable[[Exception], Exception]
    by_host: bool = field(init=False)

    def __post_init__(self) -> None:
        self.by_host = "nccl" not in dist.get_backend_config(self.group)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, all of one shape."""
        return self.all_reduce_(tensor.clone(memory_format=torch.contiguous_format))

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same sum, in the memory of ``tensor`` if that is contiguous."""
        total = tensor.contiguous()
        try:
            dist.all_reduce(total, group=self.group)
        except RuntimeError as failure:
            raise self.missing(failure) from failure
        return total

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin :meth:`all_reduce_`, and return a function that waits for the sum and returns it."""
        total = tensor.contiguous()
        try:
            work = dist.all_reduce(total, group=self.group, async_op=True)
        except RuntimeError as failure:
            raise self.missing(failure) from failure

        def finish() -> torch.Tensor:
            try:
                if work is not None:
                    work.wait()
            except RuntimeError as failure:
                raise self.missing(failure) from failure
            return total

        return finish

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The ranks' tensors in rank order; ``shapes`` gives the shape of each."""
        sizes = [int(torch.Size(s).numel()) for s in shapes]
        longest = max(sizes)
        if not longest:
            return [tensor.new_empty(list(s)) for s in shapes]
        padded = tensor.reshape(-1)
        if padded.numel() < longest:  # backends gather equal sizes only
            padded = torch.cat([padded, padded.new_empty(longest - padded.numel())])
        gathered = padded.new_empty(self.size * longest)
        try:
            dist.all_gather(list(gathered.split(longest)), padded.contiguous(), group=self.group)
        except RuntimeError as failure:
            raise self.missing(failure) from failure
        return [
            gathered[r * longest : r * longest + n].view(list(s))
            for r, (n, s) in enumerate(zip(sizes, shapes, strict=True))
        ]
