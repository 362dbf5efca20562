"""mesh: find or start the process group of ``tp`` ranks, and run a step on all ranks together."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autotp.errors import AutoTPError, CaptureError, LaunchError, MismatchError, check_tp
from autotp.options import TIMEOUT

__all__ = ["Mesh", "describe_differences", "join"]

R = TypeVar("R")


@dataclass
class Mesh:
    """This process's rank among the tensor-parallel ranks, and their group.

    Attributes:
        rank: this process's rank.
        tp: the number of ranks.
        group: their process group; None for a single rank without one.
        replica: the number of this group among the groups that hold the same model (data parallelism).
        replicas: how many such groups there are, as far as is known.
        number: which of the models that this process has parallelized it is.
    """

    rank: int
    tp: int
    group: dist.ProcessGroup | None
    replica: int = 0
    replicas: int = 1
    number: int = 0

    def gathered(self, value: Any) -> list[Any]:
        """All ranks' values (any picklable objects), in rank order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.tp
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, entries: Mapping[str, Any]) -> None:
        """Raise on every rank if the ranks' entries differ.

        Raises:
            MismatchError: some entries differ; the message lists them, with each rank's value.
        """
        if differences := describe_differences(self.gathered(dict(entries))):
            raise MismatchError(f"the ranks must agree, but differ in\n{differences}")

    @contextlib.contextmanager
    def together(self, doing: str, kind: type[AutoTPError] = AutoTPError) -> Iterator[None]:
        """Run a step that may fail on some ranks only; if it fails on any rank, all ranks raise.

        Args:
            doing: the step, for messages.
            kind: the error on ranks on which the step has not failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        texts = self.gathered(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failures = [f"{doing} failed on rank {r}: {text}" for r, text in enumerate(texts) if text is not None]
        if failures:
            raise kind(failures[0])

    def attempt(
        self, doing: str, step: Callable[[], R], recoverable: type[CaptureError] = CaptureError
    ) -> tuple[R, None] | tuple[None, CaptureError]:
        """Run a step that may fail, and go on if it has failed on every rank in a way that all can recover from.

        Args:
            doing: the step, for messages.
            step: the step.
            recoverable: the errors to recover from.

        Returns:
            The step's result and None, on every rank; or None and this rank's error, if every rank has one.

        Raises:
            Exception: the step has failed on some ranks only, or in another way; it is raised as by :meth:`together`.
        """
        error: CaptureError | None = None
        with self.together(doing):
            try:
                result = step()
            except recoverable as caught:
                error = caught
        if len(set(self.gathered(error is None))) > 1:
            with self.together(doing):
                if error is not None:
                    raise error
        return (result, None) if error is None else (None, error)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor with rank 0's."""
        if self.group is not None:
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)


def describe_differences(entries: Sequence[Mapping[str, Any]]) -> str:
    """A line for each key at which the ranks' entries differ, with every rank's value; empty if none differ."""
    lines = []
    for key in dict.fromkeys(k for entry in entries for k in entry):
        values = [entry.get(key, "nothing") for entry in entries]
        if any(v != values[0] for v in values):
            lines.append(f"  {key}: " + ", ".join(f"{v} on rank {r}" for r, v in enumerate(values)))
    more = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
    return "\n".join(lines[:12]) + more


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
        backend: the backend of a group that is started here; by default ``nccl`` with CUDA, else ``gloo``.
        timeout: how long collectives wait in groups that are started here.

    Raises:
        LaunchError: there is no group, and the environment does not say how to start one.
        MismatchError: the group's size does not fit ``tp``, or ranks ask for different ``tp``.
    """
    check_tp(tp)
    replica, replicas = 0, 1
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise MismatchError(
                f"mesh has {mesh.ndim} dims {mesh.mesh_dim_names}: pass the one-dimensional part for tp"
            )
        replica, replicas = _replica(mesh)
        mesh = mesh.get_group()
    if mesh is not None:
        joined = Mesh(dist.get_rank(mesh), dist.get_world_size(mesh), mesh, replica, replicas)
        joined.agree({"tp": tp})
        if joined.tp != tp:
            raise MismatchError(f"tp={tp}, but the mesh given has {joined.tp} ranks")
        return joined
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
    return Mesh(dist.get_rank() % tp, tp, group, dist.get_rank() // tp, world // tp)


def _replica(mesh: DeviceMesh) -> tuple[int, int]:
    """The number of a mesh's group among the groups along the same dim of its root mesh, and how many there are.

    Groups are ordered by their lowest rank.
    """
    find = getattr(mesh, "_get_root_mesh", None)  # torch has no public name for it
    root = find() if find is not None else mesh
    groups = sorted(row for row in _groups_of(root, mesh))
    own = sorted(mesh.mesh.flatten().tolist())
    return (groups.index(own), len(groups)) if own in groups else (0, 1)


def _groups_of(root: DeviceMesh, mesh: DeviceMesh) -> list[list[int]]:
    """The groups of ranks along the dim of ``root`` that has the name of the dim of ``mesh``."""
    names = root.mesh_dim_names or ()
    name = (mesh.mesh_dim_names or ("",))[0]
    if name not in names:
        return []
    ranks = root.mesh.movedim(names.index(name), -1)
    return [sorted(row) for row in ranks.reshape(-1, ranks.shape[-1]).tolist()]
