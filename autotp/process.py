"""Processes: the group of tensor-parallel ranks, and the fabric through which graphs use it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autotp.errors import AutoTPError, LaunchError, MismatchError, check_tp
from autotp.groups import new_group
from autotp.shared_memory import SharedMemory, join_board
from autotp.symmetric_memory import join_symmetric_memory
from passes import fabric

__all__ = ["Mesh", "ProcessCommunicator", "ProcessFabric", "join"]

TIMEOUT = timedelta(minutes=10)
"""How long a collective may wait for the other ranks in groups that autotp itself starts."""
_CPU = torch.device("cpu")


@dataclass
class Mesh:
    """This process's place among the tensor-parallel ranks; ``group`` is None for a single rank."""

    rank: int
    tp: int
    group: dist.ProcessGroup | None

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (any picklable object), in rank order."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.tp
        dist.all_gather_object(found, value, group=self.group)
        return found

    def agree(self, what: Mapping[str, Any]) -> None:
        """Raise on every rank if the ranks differ in any entry of ``what``.

        Raises:
            MismatchError: it names the entries that differ, and the ranks' values.
        """
        every = self.gathered(dict(what))
        lines = []
        for key in dict.fromkeys(k for each in every for k in each):
            values = [each.get(key, "nothing") for each in every]
            if any(v != values[0] for v in values):
                lines.append(f"  {key}: " + ", ".join(f"{v} on rank {r}" for r, v in enumerate(values)))
        if lines:
            more = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
            raise MismatchError("the ranks must agree, but differ in\n" + "\n".join(lines[:12]) + more)

    @contextlib.contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run a step that may fail on some ranks only; if it fails on one, raise on all."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        said = self.gathered(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [(r, s) for r, s in enumerate(said) if s is not None]
        if failed:
            raise AutoTPError(f"{doing} failed on rank {failed[0][0]}: {failed[0][1]}")

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor by rank 0's."""
        if self.group is not None:
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)


def _launch_line(tp: int) -> str:
    script = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] and sys.argv[0] != "-c" else "your_script.py"
    return f"torchrun --nproc-per-node {tp} {script}"


def join(
    tp: int, mesh: DeviceMesh | dist.ProcessGroup | None, backend: str | None, timeout: timedelta = TIMEOUT
) -> Mesh:
    """Find, or start, the group of ``tp`` ranks that this process belongs to.

    Args:
        tp: the number of tensor-parallel ranks.
        mesh: a one-dimensional DeviceMesh or a process group of ``tp`` ranks; None for the world, in
            which consecutive ranks form groups of ``tp``.
        backend: the backend to start a group with; by default ``nccl`` where CUDA is, ``gloo`` else.
        timeout: how long collectives wait in groups that are started here.

    Raises:
        LaunchError: there is no group and the environment does not say how to make one.
        MismatchError: the group's size does not fit ``tp``, or ranks ask for different ``tp``.
    """
    check_tp(tp)
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise MismatchError(
                f"mesh has {mesh.ndim} dims {mesh.mesh_dim_names}: pass the one-dimensional part for tp"
            )
        mesh = mesh.get_group()
    if mesh is not None:
        found = Mesh(dist.get_rank(mesh), dist.get_world_size(mesh), mesh)
        found.agree({"tp": tp})
        if found.tp != tp:
            raise MismatchError(f"tp={tp}, but the mesh given has {found.tp} ranks")
        return found
    if not dist.is_initialized():
        if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
            if tp == 1:
                return Mesh(0, 1, None)
            raise LaunchError(
                f"tp={tp} needs {tp} processes, and there is neither a process group nor a launcher's environment "
                f"(RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Start the script with\n\n    {_launch_line(tp)}\n"
            )
        if backend is None:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available() and "nccl" in backend:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group(backend, timeout=timeout)
    world = dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    Mesh(dist.get_rank(), world, group).agree({"tp": tp})
    if world % tp:
        raise MismatchError(
            f"tp={tp} does not divide the {world} processes that were started: start a multiple of {tp}, as with\n\n"
            f"    {_launch_line(tp)}\n"
        )
    if world != tp:
        own = dist.get_rank() // tp
        groups = [dist.new_group(list(range(start, start + tp)), timeout=timeout) for start in range(0, world, tp)]
        group = groups[own]
    return Mesh(dist.get_rank() % tp, tp, group)


@dataclass
class _Solo:
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
    """One process's end of a process group; ``missing`` makes the error of a collective that fails."""

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
        """The same, in the memory of ``tensor`` if that has no gaps."""
        total = tensor.contiguous()
        try:
            dist.all_reduce(total, group=self.group)
        except RuntimeError as failure:
            raise self.missing(failure) from failure
        return total

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin :meth:`all_reduce_`; what it returns waits for the sum, and gives it."""
        total = tensor.contiguous()
        try:
            begun = dist.all_reduce(total, group=self.group, async_op=True)
        except RuntimeError as failure:
            raise self.missing(failure) from failure

        def finish() -> torch.Tensor:
            try:
                if begun is not None:
                    begun.wait()
            except RuntimeError as failure:
                raise self.missing(failure) from failure
            return total

        return finish

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The ranks' tensors in rank order; ``shapes`` says what shape each has."""
        sizes = [int(torch.Size(s).numel()) for s in shapes]
        most = max(sizes)
        if not most:
            return [tensor.new_empty(list(s)) for s in shapes]
        mine = tensor.reshape(-1)
        if mine.numel() < most:  # backends gather equal sizes only
            mine = torch.cat([mine, mine.new_empty(most - mine.numel())])
        every = mine.new_empty(self.size * most)
        try:
            dist.all_gather(list(every.split(most)), mine.contiguous(), group=self.group)
        except RuntimeError as failure:
            raise self.missing(failure) from failure
        return [
            every[r * most : r * most + n].view(list(s)) for r, (n, s) in enumerate(zip(sizes, shapes, strict=True))
        ]


@dataclass
class ProcessFabric:
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
    _groups: dict[str, fabric.Communicator] = field(default_factory=dict)
    _streams: dict[tuple[bool, str], torch.Tensor] = field(default_factory=dict)

    def group(self, name: str) -> fabric.Communicator:
        """The communicator of a named group; replica groups are made when first asked for."""
        if name not in self._groups:
            self._groups[name] = self._make(name)
        return self._groups[name]

    def _make(self, name: str) -> fabric.Communicator:
        mesh = self.mesh
        _, parts = fabric.parse_group(name)
        members = next((p for p in parts if mesh.rank in p), list(range(mesh.tp)))
        if mesh.group is None or len(members) == 1:
            return _Solo()
        group = mesh.group
        if len(members) < mesh.tp:
            ranks = [dist.get_global_rank(mesh.group, m) for m in members]
            group = new_group(ranks, self.timeout)
        return self._nearest(ProcessCommunicator(group, members.index(mesh.rank), len(members), self.missing))

    def _nearest(self, far: ProcessCommunicator) -> fabric.Communicator:
        """The fastest way between the ranks of a group: memory, where they share it, else the group itself."""
        near: fabric.Communicator = far
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

    def restart(self, seed: int) -> None:
        """Start the streams of random numbers anew."""
        self.seed = seed
        self._streams.clear()

    @contextlib.contextmanager
    def random(self, same: bool, device: torch.device) -> Iterator[None]:
        """Random numbers from the stream shared by all ranks, or from this rank's own."""
        cuda = device.type == "cuda"
        before = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
        key = (same, str(device))
        if key not in self._streams:
            generator = torch.Generator(device if cuda else "cpu")
            self._streams[key] = generator.manual_seed(self.seed + (0 if same else 1 + self.mesh.rank)).get_state()
        self._restore(cuda, device, self._streams[key])
        try:
            yield
        finally:
            self._streams[key] = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
            self._restore(cuda, device, before)

    @staticmethod
    def _restore(cuda: bool, device: torch.device, state: torch.Tensor) -> None:
        if cuda:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
