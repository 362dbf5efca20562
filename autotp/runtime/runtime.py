"""runtime: the object that a parallelized module carries: its ranks, its shards, its call."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from autotp.arguments.arguments import Arguments
from autotp.distributed.agreement import Agreement
from autotp.distributed.process_context import ProcessContext
from autotp.errors import AutoTPError
from autotp.modules.forward_patching import own_forward, patch_forward
from autotp.modules.names import tied_names
from autotp.utils.value_types import DTENSOR, is_a
from autotp.weights.shard_tensor import plain
from autotp.weights.slicing import shards_of, unshard
from passes import Layout, Shards

__all__ = ["Runtime"]


class Runtime:
    """The ranks of a parallelized module, the shards that they hold of it, and its call.

    Args:
        model: the module, whose parameters hold this rank's shards.
        agreement: compares the ranks before each step.
        context: communicates between the ranks.

    Attributes:
        saves: how often the module was saved to each folder, by the folder and the steps of the optimizer till then.
    """

    def __init__(self, model: nn.Module, agreement: Agreement, context: ProcessContext) -> None:
        self.model, self.agreement, self.context = model, agreement, context
        self.mesh = agreement.mesh
        self.tied = tied_names(model)
        self.own_forward = own_forward(model)
        self.saves: dict[tuple[str, int], int] = {}

    @property
    def weight_layouts(self) -> Mapping[str, Layout]:
        """The split parameters' layouts, by their first names in the module."""
        raise NotImplementedError

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the module: this rank computes its part, and the result is what the module itself returns."""
        raise NotImplementedError

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Arguments, flat."""
        return Arguments(args, kwargs)

    def attach(self) -> None:
        """Replace the module's forward by this runtime."""
        patch_forward(self.model, self, self)

    def is_running(self) -> bool:
        """Whether the module's own Python is running, which may not read a shard unnoticed."""
        return False

    def restart_random(self) -> None:
        """Start the random streams of the model's parts anew, so that a part that runs twice draws the same."""

    def shards(self, name: str) -> dict[int, Shards]:
        """The split dims of a parameter, by any of its names."""
        return shards_of(self.weight_layouts, self.tied.get(name, name))

    def shards_of(self, name: str, tensor: torch.Tensor) -> dict[int, Shards]:
        """The split dims of a parameter, or of state of the module, of which this rank holds ``tensor``."""
        return self.shards(name)

    def placed(self) -> Iterator[tuple[str, nn.Parameter, dict[int, Shards]]]:
        """Each parameter once: its name, itself, its split dims."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter, self.shards(name)

    def stepped(self) -> None:
        """Count an optimizer's step; the next call finds ranks that have taken different numbers of steps."""
        self.agreement.steps += 1

    def whole(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """The dense tensor of which each rank holds ``local`` under this name. Collective."""
        if is_a(local, DTENSOR):  # FSDP2 splits it further, over ranks that hold the same
            local = local.full_tensor()  # type: ignore[attr-defined]
        shards = self.shards_of(name, local)
        return self.gather(local, shards) if shards else plain(local).detach().clone()

    def gather(self, local: torch.Tensor, shards: Mapping[int, Shards]) -> torch.Tensor:
        """The dense tensor of which each rank holds ``local``, by its split dims. Collective."""
        shapes = [list(local.shape) for _ in range(self.mesh.tp)]
        for dim, s in shards.items():
            for rank, count in enumerate(s.counts):
                shapes[rank][dim] = count
        return unshard(self.context.group("tp").all_gather(plain(local).detach(), shapes), shards)

    def _copied(self, memo: dict[int, Any]) -> Any:
        """A new runtime for the copy of the module, with the same ranks and random streams."""
        model = memo.get(id(self.model))
        if model is None:
            raise AutoTPError("a part of a parallelized model cannot be copied: copy the model, or what holds it")
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.model, copied.agreement, copied.context = model, self.agreement, self.context
        copied.mesh, copied.tied, copied.saves = self.mesh, self.tied, {}
        copied.own_forward = copy.deepcopy(self.own_forward, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AutoTPError(
            f"a parallelized {type(self.model).__name__} cannot be pickled: save autotp.full_state_dict(model), or "
            "model.state_dict() per rank, and load it into a model made, and parallelized, anew"
        )
