"""process_context: what a graph needs of its process, which are communicators by group name and random streams."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from autotp.distributed.communicators import ProcessCommunicator, SoloCommunicator
from autotp.distributed.mesh import Mesh
from autotp.distributed.process_groups import new_group
from autotp.distributed.random_state import draw_from
from autotp.distributed.shared_memory import SharedMemory, join_board
from autotp.distributed.symmetric_memory import join_symmetric_memory
from autotp.options import Options
from passes.ops import context

__all__ = ["ProcessContext"]
_CPU = torch.device("cpu")


@dataclass
class ProcessContext:
    """The parallel context of one process: process groups by name, and two streams of random numbers.

    Args:
        mesh: this process's rank and group.
        seed: the seed of the random numbers.
        missing: returns the error to raise where a collective fails.
        options: the user's: timeout, shared and symmetric memory.
        device: the model's device.
    """

    mesh: Mesh
    seed: int
    missing: Callable[[Exception], Exception]
    options: Options = field(default_factory=Options)
    device: torch.device = _CPU
    _groups: dict[str, context.Communicator] = field(default_factory=dict)
    _streams: dict[tuple[bool, str], torch.Tensor] = field(default_factory=dict)

    def group(self, name: str) -> context.Communicator:
        """The communicator of a named group; it is made at the first request."""
        if name not in self._groups:
            self._groups[name] = self._make(name)
        return self._groups[name]

    def _make(self, name: str) -> context.Communicator:
        mesh = self.mesh
        _, replica_groups = context.parse_group(name)
        members = next((g for g in replica_groups if mesh.rank in g), list(range(mesh.tp)))
        if mesh.group is None or len(members) == 1:
            return SoloCommunicator()
        group = mesh.group
        if len(members) < mesh.tp:
            ranks = [dist.get_global_rank(mesh.group, m) for m in members]
            group = new_group(ranks, self.options.timeout)
        return self._nearest(ProcessCommunicator(group, members.index(mesh.rank), len(members), self.missing))

    def _nearest(self, fallback: ProcessCommunicator) -> context.Communicator:
        """The fastest communicator of a group: through memory where the ranks can share it, else the group itself."""
        communicator: context.Communicator = fallback
        backends = dist.get_backend_config(fallback.group)
        if self.options.symmetric_memory and "nccl" in backends and self.device.type == "cuda":
            communicator = join_symmetric_memory(fallback, self.device) or fallback
        if self.options.shared_memory and "gloo" in backends:
            board = join_board(fallback.group, fallback.rank, fallback.size, self.options.timeout)
            communicator = communicator if board is None else SharedMemory(board, communicator, self.missing)
        return communicator

    def release(self) -> None:
        """Drop the groups."""
        self._groups.clear()

    def stream(self, number: int) -> ProcessContext:
        """A context of the same ranks whose random numbers come from other streams."""
        return replace(self, seed=self.seed + number + self.mesh.tp, _groups={}, _streams={})

    def restart(self, seed: int) -> None:
        """Start the random streams again, from another seed."""
        self.seed = seed
        self._streams.clear()

    def random(self, same: bool, device: torch.device) -> AbstractContextManager[None]:
        """Let torch draw from the stream that all ranks have in common (``same``), or from this rank's own."""
        seed = self.seed + (0 if same else 1 + self.mesh.rank)
        return draw_from(self._streams, (same, str(device)), device, seed)
