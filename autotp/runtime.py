"""runtime: what a parallelized model carries, and what happens when it is called."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import nn

from autotp.agreement import Agreement
from autotp.calls import Programs
from autotp.capture import tied_names
from autotp.clipping import count_once
from autotp.errors import AutoTPError
from autotp.loading import accept_dense
from autotp.optimizers import check_steps
from autotp.process import TIMEOUT, Mesh, ProcessFabric
from autotp.registry import register
from autotp.shards import joined, shards_of
from passes import Shards, fabric

__all__ = ["Runtime"]


class Runtime:
    """A model's place among the ranks and its programs; the model is its ``model``.

    Args:
        model: the model, whose parameters hold this rank's share.
        mesh: the ranks.
        programs: the model's programs, one of them made.
        seed: the seed of random numbers, the same on all ranks.
        timeout: how long a rank waits for the others at the start of a call.
        debug: whether ranks compare values at each call.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, programs: Programs, seed: int, timeout: timedelta = TIMEOUT,
        debug: bool = False,
    ) -> None:  # fmt: skip
        self.agreement = Agreement(mesh, type(model).__name__, timeout)
        self.fabric = ProcessFabric(mesh, seed, self.agreement.missing, timeout)
        self.tied = tied_names(model)
        self.own_forward = model.__dict__.get("forward")
        self._take(model, mesh, programs, debug)

    def _take(self, model: nn.Module, mesh: Mesh, programs: Programs, debug: bool) -> None:
        self.model, self.mesh, self.programs, self.capturing = model, mesh, programs, False
        programs.rank, programs.agreement, programs.debug = mesh.rank, self.agreement, debug
        register(self)

    def attach(self) -> None:
        """Let the model run this: its forward, its submodules' refusal, what it loads, and torch around it."""
        self.guard(self.model)
        accept_dense(self.model, {n: self.shards(n) for n in self.tied}, self.mesh.rank)
        count_once()
        check_steps()
        self.model.__dict__["_autotp"] = self
        self.model.__dict__["forward"] = _Forward(self)
        self.programs.watch.settle()

    def guard(self, model: nn.Module) -> None:
        """Let submodules that hold shards refuse to be called: their own code computes on whole weights."""
        for name, module in model.named_modules():
            inside = [f"{name}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)]
            if name and any(self.shards(n) for n in inside):
                module.register_forward_pre_hook(functools.partial(self._refuse, name))

    def _refuse(self, name: str, module: nn.Module, args: Any) -> None:
        if not self.capturing:
            raise AutoTPError(
                f"{name} holds only this rank's share of its weights and cannot be called by itself: call the "
                "model that was parallelized, or parallelize this module instead of the whole"
            )

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """This rank's part of a call of the model, and the model's own kind of output."""
        program, tensors = self.programs.find(args, kwargs)
        run = self.programs.graph(program, self.mesh.rank)
        with fabric.use(self.fabric):
            return program.unflatten(run(*tensors))

    def shards(self, name: str) -> dict[int, Shards]:
        """The split dims of a parameter, by any of its names."""
        return shards_of(self.programs.stored or {}, self.tied.get(name, name))

    def placed(self) -> Iterator[tuple[str, nn.Parameter, dict[int, Shards]]]:
        """Each parameter once: its name, itself, its split dims."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter, self.shards(name)

    def stepped(self) -> None:
        """Count an optimizer's step; ranks that have taken different numbers of steps are found at the next call."""
        self.programs.steps += 1

    def whole(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """The full tensor of which each rank holds ``local`` under this name. Collective."""
        shards = self.shards(name)
        if not shards:
            return local.detach().clone()
        shapes = [list(local.shape) for _ in range(self.mesh.tp)]
        for dim, s in shards.items():
            for rank, count in enumerate(s.counts):
                shapes[rank][dim] = count
        return joined(self.fabric.group("tp").all_gather(local.detach(), shapes), shards)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The runtime of a copy of the model: the same ranks, shards and random streams; graphs are made anew."""
        model = memo.get(id(self.model))
        if model is None:
            raise AutoTPError("a part of a parallelized model cannot be copied: copy the model, or what holds it")
        copied = memo[id(self)] = Runtime.__new__(Runtime)
        copied.agreement, copied.fabric, copied.tied = self.agreement, self.fabric, self.tied
        copied.own_forward = copy.deepcopy(self.own_forward, memo)
        programs = Programs(model, self.mesh.tp, self.programs.dense, self.programs.stored)
        copied._take(model, self.mesh, programs, self.programs.debug)
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AutoTPError(
            f"a parallelized {type(self.model).__name__} cannot be pickled: save autotp.full_state_dict(model), or "
            "model.state_dict() per rank, and load it into a model made, and parallelized, anew"
        )


class _Forward:
    """A parallelized model's ``forward``; its signature is the model's own."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        functools.update_wrapper(self, runtime.own_forward or runtime.model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.runtime(args, kwargs)
