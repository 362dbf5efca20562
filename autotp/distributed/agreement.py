"""agreement: the ranks compare what they are about to do together, before they do it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import all_reduce as _all_reduce

from autotp.distributed.mesh import Mesh, describe_differences
from autotp.distributed.process_groups import new_group
from autotp.distributed.shared_memory import join_board
from autotp.distributed.shared_memory_board import LINE, Board
from autotp.errors import AutoTPError, MismatchError
from autotp.utils.hashing import combined, stable_hash

__all__ = ["Agreement"]


class Agreement:
    """The comparison of ranks before every step that has collectives.

    Ranks that run different steps pair up collectives that do not belong together: they hang, or, where
    shapes happen to fit, go on with wrong numbers. So each step starts with a comparison of one
    fingerprint, through memory that nothing else uses or, between hosts, on a gloo group likewise (the largest of it
    and of its negative); only where they differ are the details exchanged. No collective of the step itself starts
    before.

    Args:
        mesh: this process among the ranks.
        model: what to call the model in messages.
        timeout: how long a rank waits for the others.
        debug: whether calls are compared in the values of inputs and of whole parameters, too.
        shared_memory: whether ranks on one host compare through memory.
        broadcast_inputs: whether ranks that are given other inputs than rank 0 take its.

    Attributes:
        number: how many steps this rank has begun.
        doing: the last of them, for messages.
        steps: how many steps optimizers have taken on the model's parameters.
    """

    def __init__(
        self, mesh: Mesh, model: str, timeout: timedelta, debug: bool = False, shared_memory: bool = True,
        broadcast_inputs: bool = False,
    ) -> None:  # fmt: skip
        self.mesh, self.model, self.timeout, self.debug = mesh, model, timeout, debug
        self.broadcast_inputs = broadcast_inputs
        self.number, self.doing, self.steps = 0, "parallelize", 0
        self._doings: dict[str, int] = {}
        self._group: dist.ProcessGroup | None = None
        self._board: Board | None = None
        if mesh.group is not None:
            ranks = dist.get_process_group_ranks(mesh.group)
            self._group = new_group(ranks, timeout, "gloo")
            if shared_memory:
                self._board = join_board(self._group, mesh.rank, mesh.tp, timeout, slot=LINE)

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self._group is None

    def check(
        self,
        doing: str,
        fingerprint: int,
        describe: Callable[[], Mapping[str, str]],
        error: Exception | None = None,
        inputs: Callable[[], Mapping[str, str]] | None = None,
    ) -> bool:
        """Raise on every rank unless all of them are about to do the same.

        Args:
            doing: what, for messages: ``"call"``, ``"full_state_dict"``.
            fingerprint: equal on two ranks if and only if they do the same.
            describe: the details behind the fingerprint; asked for only where ranks differ.
            error: what this rank would raise instead. It is raised here, and the others learn of it.
            inputs: those of the details that rank 0's may replace, where ``broadcast_inputs`` is set.

        Returns:
            True; or False, on every rank, if the ranks differ in such inputs only, and are to take rank 0's.

        Raises:
            MismatchError: the ranks differ, which it names; or some have not come within the timeout.
        """
        if not self.same(doing, fingerprint, error):
            head = {"what it does": doing, **({"error": _said(error)} if error else {})}
            found = self.gathered((head, dict(inputs()) if inputs is not None else {}, dict(describe())))
            alike = all((h, rest) == (head, found[0][2]) for h, _, rest in found)
            if self.broadcast_inputs and inputs is not None and error is None and alike:
                return False
            if error is None:
                raise MismatchError(f"{self._where()}: {_differences([h | given | rest for h, given, rest in found])}")
        if error is not None:
            raise error
        return True

    def same(self, doing: str, fingerprint: int, error: Exception | None = None) -> bool:
        """Whether all ranks are about to do the same: the first half of :meth:`check`.

        Raises:
            MismatchError: some have not come within the timeout.
        """
        self.number, self.doing = self.number + 1, doing
        if self._group is None:
            return True
        if (known := self._doings.get(doing)) is None:
            known = self._doings[doing] = stable_hash(doing)
        own = combined(self.number, known, fingerprint, stable_hash(_said(error)) if error is not None else 0)
        try:
            return self._board.same(own) if self._board is not None else self._same(own)
        except RuntimeError as failure:
            raise self.missing(failure) from (error or failure)

    def release(self) -> None:
        """Let the group go; nothing is compared from now on."""
        self._group = self._board = None

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, through the CPU; for what is rare."""
        found: list[Any] = [value] * self.mesh.tp
        if self._group is not None:
            dist.all_gather_object(found, value, group=self._group)
        return found

    def of_rank_0(self, value: Any) -> Any:
        """Rank 0's ``value``, through the CPU."""
        held = [value]
        if self._group is not None:
            dist.broadcast_object_list(held, dist.get_global_rank(self._group, 0), group=self._group)
        return held[0]

    def _same(self, number: int) -> bool:
        pair = torch.tensor([number, -number])
        _all_reduce(pair, dist.ReduceOp.MAX, self._group)
        return int(pair[0]) == -int(pair[1])

    def _where(self) -> str:
        return f"step {self.number} of this {self.model} on {self.mesh.tp} ranks"

    def missing(self, failure: Exception) -> AutoTPError:
        """The error of a step that not all ranks joined in, with the ranks that did not."""
        absent = self._absent()
        who = f"rank {' and '.join(map(str, absent))}" if absent else "a rank"
        first = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
        return MismatchError(
            f"{self._where()}, {self.doing}: {who} did not come within {self.timeout.total_seconds():g} s. Either that "
            "process has died or hangs, or the ranks' scripts differ: all must call the model, backward, "
            "full_state_dict, full_gradients and clip_grad_norm_ equally often and in the same order. "
            f"(parallelize(timeout=...) sets how long to wait. The process group said: {first})"
        )

    def _absent(self) -> list[int]:
        """The ranks that do not say, too, that they wait in this step: their group breaks when the first gives up."""
        if self._group is None:
            return []
        key = f"autotp/{self._group.group_name}/{self.number}"
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"{key}/{self.mesh.rank}", self.doing)
            time.sleep(min(1.0, self.timeout.total_seconds() / 4))
            return [r for r in range(self.mesh.tp) if not store.check([f"{key}/{r}"])]
        except Exception:  # the process that keeps the store may be the one that died
            return []


def _said(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}" if error is not None else ""


def _differences(found: list[Mapping[str, str]]) -> str:
    if len({each["what it does"] for each in found}) > 1:  # then all else differs, too
        found = [{k: each[k] for k in ("what it does", "error") if k in each} for each in found]
    return f"the ranks must do the same, but differ in\n{describe_differences(found)}"
