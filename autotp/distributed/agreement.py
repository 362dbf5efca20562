"""agreement: ranks compare the next step with collectives before any of them starts it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import all_reduce as _all_reduce

from autotp.distributed.mesh import Mesh, describe_differences
from autotp.distributed.process_groups import new_group
from autotp.distributed.shared_memory import join_board
from autotp.distributed.shared_memory_board import LINE, Board
from autotp.errors import AutoTPError, MismatchError
from autotp.options import Options
from autotp.utils.hashing import combined, stable_hash

__all__ = ["Agreement"]

Fingerprint = int | tuple[Any, ...]
"""An integer, or integers in nested tuples."""


class Agreement:
    """Compares the ranks before every step that has collectives.

    Ranks that run different steps would pair collectives that do not belong together: they would hang or, where shapes
    happen to fit, go on with wrong numbers. So each step starts with a comparison of one fingerprint. On one host it
    goes through mapped memory that nothing else uses. Between hosts it goes through a gloo group that nothing else
    uses, as the maximum of the fingerprint and of its negative. The ranks exchange details only where the fingerprints
    differ. No collective of the step itself starts earlier.

    Args:
        mesh: this process's rank and group.
        model: the model's name in messages.
        options: the user's: timeout, debug, shared memory, broadcast of inputs.

    Attributes:
        is_alone: whether there is no other rank.
        number: how many steps this rank has begun.
        doing: the name of the last step, for messages.
        steps: how many steps optimizers have taken on the model's parameters.
    """

    def __init__(self, mesh: Mesh, model: str, options: Options | None = None) -> None:
        options = options or Options()
        self.mesh, self.model, self.timeout, self.debug = mesh, model, options.timeout, options.debug
        self.broadcast_inputs = options.broadcast_inputs
        self.number, self.doing, self.steps = 0, "parallelize", 0
        self._step_hashes: dict[str, int] = {}
        self.is_alone = mesh.group is None
        self._group: dist.ProcessGroup | None = None
        self._board: Board | None = None
        if mesh.group is not None:
            ranks = dist.get_process_group_ranks(mesh.group)
            self._group = new_group(ranks, self.timeout, "gloo")
            if options.shared_memory:
                self._board = join_board(self._group, mesh.rank, mesh.tp, self.timeout, slot=LINE)

    def check(
        self,
        doing: str,
        fingerprint: Fingerprint,
        describe: Callable[[], Mapping[str, str]],
        error: Exception | None = None,
        inputs: Callable[[], Mapping[str, str]] | None = None,
        tensors: Sequence[torch.Tensor] = (),
    ) -> bool:
        """Raise on every rank unless all ranks are about to run the same step.

        Args:
            doing: the step's name, for messages: ``"call"``, ``"full_state_dict"``.
            fingerprint: equal on two ranks if and only if their steps are the same.
            describe: returns the details behind the fingerprint; called only where the ranks differ.
            error: an error of this rank. It is raised here, and the other ranks learn of it.
            inputs: returns the details that rank 0's may replace, where ``broadcast_inputs`` is set.
            tensors: integer tensors on the CPU whose values are compared, too.

        Returns:
            True if the ranks agree. False, on every rank, if they differ in such inputs only, and must take rank 0's.

        Raises:
            MismatchError: the ranks differ, and the message lists the differences; or some have not come within the
                timeout.
        """
        if not self.same(doing, fingerprint, error, tensors):
            head = {"what it does": doing, **({"error": _error_text(error)} if error else {})}
            ranks = self.gathered((head, dict(inputs()) if inputs is not None else {}, dict(describe())))
            inputs_only = all((h, details) == (head, ranks[0][2]) for h, _, details in ranks)
            if self.broadcast_inputs and inputs is not None and error is None and inputs_only:
                return False
            if error is None:
                steps = [h | values | details for h, values, details in ranks]
                raise MismatchError(f"{self._step()}: {_mismatch(steps)}")
        if error is not None:
            raise error
        return True

    def same(
        self, doing: str, fingerprint: Fingerprint, error: Exception | None = None, tensors: Sequence[torch.Tensor] = ()
    ) -> bool:
        """Whether all ranks are about to run the same step: the first half of :meth:`check`.

        Raises:
            MismatchError: some have not come within the timeout.
        """
        self.number, self.doing = self.number + 1, doing
        if self._group is None:
            return True
        if (step_hash := self._step_hashes.get(doing)) is None:
            step_hash = self._step_hashes[doing] = stable_hash(doing)
        error_hash = stable_hash(_error_text(error)) if error is not None else 0
        word = combined(self.number, step_hash, fingerprint, error_hash, tensors=tensors)
        try:
            return self._board.same(word) if self._board is not None else self._same_in_group(word)
        except RuntimeError as failure:
            raise self.missing(failure) from (error or failure)

    def release(self) -> None:
        """Drop the group; from now on nothing is compared."""
        self._group, self._board, self.is_alone = None, None, True

    def gathered(self, value: Any) -> list[Any]:
        """All ranks' values in rank order, through the CPU; for rare exchanges."""
        values: list[Any] = [value] * self.mesh.tp
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def of_rank_0(self, value: Any) -> Any:
        """Rank 0's ``value``, through the CPU."""
        values = [value]
        if self._group is not None:
            dist.broadcast_object_list(values, dist.get_global_rank(self._group, 0), group=self._group)
        return values[0]

    def _same_in_group(self, word: int) -> bool:
        """Whether all ranks have the same word, by one all-reduce: its maximum is then also its minimum."""
        pair = torch.tensor([word, -word])
        _all_reduce(pair, dist.ReduceOp.MAX, self._group)
        return int(pair[0]) == -int(pair[1])

    def _step(self) -> str:
        """The step in words, for messages."""
        return f"step {self.number} of this {self.model} on {self.mesh.tp} ranks"

    def missing(self, failure: Exception) -> AutoTPError:
        """The error of a step that not all ranks have joined; it names those that have not."""
        absent = self._absent_ranks()
        who = f"rank {' and '.join(map(str, absent))}" if absent else "a rank"
        first = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
        return MismatchError(
            f"{self._step()}, {self.doing}: {who} did not come within {self.timeout.total_seconds():g} s. Either that "
            "process has died or hangs, or the ranks' scripts differ: all must call the model, backward, save, "
            "full_state_dict, full_gradients, parameters_norm and clip_grad_norm_ equally often and in the same order. "
            f"(parallelize(timeout=...) sets how long to wait. The process group said: {first})"
        )

    def _absent_ranks(self) -> list[int]:
        """The ranks that do not report that they wait in this step.

        They report through the store, since their group breaks when the first rank gives up.
        """
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


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _mismatch(steps: list[Mapping[str, str]]) -> str:
    """The differences between the ranks' steps, in words."""
    if len({step["what it does"] for step in steps}) > 1:  # then all else differs, too
        steps = [{k: step[k] for k in ("what it does", "error") if k in step} for step in steps]
    return f"the ranks must do the same, but differ in\n{describe_differences(steps)}"
