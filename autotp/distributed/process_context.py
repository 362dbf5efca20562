"""process_context: what a graph needs of its process: communicators by group name, random streams."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from autotp.distributed.communicators import ProcessCommunicator, SoloCommunicator
from autotp.distributed.mesh import TIMEOUT, Mesh
from autotp.distributed.process_groups import new_group
from autotp.distributed.random_state import draw_from
from autotp.distributed.shared_memory import SharedMemory, join_board
from autotp.distributed.symmetric_memory import join_symmetric_memory
from passes.ops import context

__all__ = ["ProcessContext"]
_CPU = torch.device("cpu")


@dataclass
class ProcessContext:
    """The fabric of one process: process groups by name, and two streams of random numbers.

    Args:
        mesh: this process among the ranks.
        seed: of the random numbers.
        missing: makes the error of a collective that fails.
        timeout: how long a collective waits.
        shared_memory: whether CPU ranks on one host communicate through memory.
        symmetric_memory: whether GPUs of one host add up small values in each other's memory, where that is offered.
        device: where the model is.
    """

    mesh: Mesh
    seed: int
    missing: Callable[[Exception], Exception]
    timeout: timedelta = TIMEOUT
    shared_memory: bool = True
    symmetric_memory: bool = False
    device: torch.device = _CPU
    _groups: dict[str, context.Communicator] = field(default_factory=dict)
    _streams: dict[tuple[bool, str], torch.Tensor] = field(default_factory=dict)

    def group(self, name: str) -> context.Communicator:
        """The communicator of a named group; replica groups are made when first asked for."""
        if name not in self._groups:
            self._groups[name] = self._make(name)
        return self._groups[name]

    def _make(self, name: str) -> context.Communicator:
        mesh = self.mesh
        _, parts = context.parse_group(name)
        members = next((p for p in parts if mesh.rank in p), list(range(mesh.tp)))
        if mesh.group is None or len(members) == 1:
            return SoloCommunicator()
        group = mesh.group
        if len(members) < mesh.tp:
            ranks = [dist.get_global_rank(mesh.group, m) for m in members]
            group = new_group(ranks, self.timeout)
        return self._nearest(ProcessCommunicator(group, members.index(mesh.rank), len(members), self.missing))

    def _nearest(self, far: ProcessCommunicator) -> context.Communicator:
        """The fastest way between the ranks of a group: memory, where they share it, else the group itself."""
        near: context.Communicator = far
        backends = dist.get_backend_config(far.group)
        if self.symmetric_memory and "nccl" in backends and self.device.type == "cuda":
            near = join_symmetric_memory(far, self.device) or far
        if self.shared_memory and "gloo" in backends:
            board = join_board(far.group, far.rank, far.size, self.timeout)
            near = near if board is None else SharedMemory(board, near, self.missing)
        return near

    def release(self) -> None:
        """Let the groups go."""
        self._groups.clear()

    def stream(self, number: int) -> ProcessContext:
        """A context of the same ranks whose random numbers come from other streams."""
        return replace(self, seed=self.seed + number + self.mesh.tp, _groups={}, _streams={})

    def restart(self, seed: int) -> None:
        """Start the streams of random numbers anew."""
        self.seed = seed
        self._streams.clear()

    def random(self, same: bool, device: torch.device) -> AbstractContextManager[None]:
        """Random numbers from the stream shared by all ranks, or from this rank's own."""
        seed = self.seed + (0 if same else 1 + self.mesh.rank)
        return draw_from(self._streams, (same, str(device)), device, seed)
