"""runtime: what a parallelized module carries, and what happens when it is called."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from autotp.agreement import Agreement
from autotp.arguments import Arguments
from autotp.between import Between
from autotp.calls import Programs
from autotp.capture import tied_names
from autotp.clipping import count_once
from autotp.comparison import Comparison
from autotp.errors import AutoTPError, UncapturedError
from autotp.forwards import Guard, asked, install, own_forward
from autotp.generation import wrap_generate
from autotp.inside import Inside
from autotp.loading import accept_dense
from autotp.optimizers import check_steps
from autotp.process import ProcessFabric
from autotp.registry import register
from autotp.shards import joined, shards_of
from autotp.watch import dotted
from passes import Layout, Shards, fabric

__all__ = ["Runtime", "Whole"]


class Runtime:
    """A module's place among the ranks, and how they hold its parameters.

    Args:
        model: the module, whose parameters hold this rank's share.
        agreement: how the ranks compare what they do.
        fabric: how they communicate.
    """

    def __init__(self, model: nn.Module, agreement: Agreement, fabric: ProcessFabric) -> None:
        self.model, self.agreement, self.fabric = model, agreement, fabric
        self.mesh = agreement.mesh
        self.tied = tied_names(model)
        self.own_forward = own_forward(model)

    @property
    def stored(self) -> Mapping[str, Layout]:
        """The split parameters' layouts, by their first names in the module."""
        raise NotImplementedError

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """This rank's part of a call of the module, and the module's own kind of output."""
        raise NotImplementedError

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Arguments, flat."""
        return Arguments(args, kwargs)

    def attach(self) -> None:
        """Let the module run this in place of its forward."""
        install(self.model, self, self)

    def is_running(self) -> bool:
        """Whether the module's own Python is running, which may not read a shard unnoticed."""
        return False

    def surround(self) -> None:
        """Let the model generate and load dense tensors, and what torch does to parameters know of this."""
        wrap_generate(self)
        accept_dense(self.model, self.shards_of, self.mesh.rank)
        count_once()
        check_steps()
        register(self)

    def shards(self, name: str) -> dict[int, Shards]:
        """The split dims of a parameter, by any of its names."""
        return shards_of(self.stored, self.tied.get(name, name))

    def shards_of(self, name: str, tensor: torch.Tensor) -> dict[int, Shards]:
        """The split dims of a parameter, or of a tensor that the module keeps, of which this rank holds ``tensor``."""
        return self.shards(name)

    def placed(self) -> Iterator[tuple[str, nn.Parameter, dict[int, Shards]]]:
        """Each parameter once: its name, itself, its split dims."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter, self.shards(name)

    def stepped(self) -> None:
        """Count an optimizer's step; ranks that have taken different numbers of steps are found at the next call."""
        self.agreement.steps += 1

    def whole(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """The full tensor of which each rank holds ``local`` under this name. Collective."""
        shards = self.shards_of(name, local)
        if not shards:
            return local.detach().clone()
        shapes = [list(local.shape) for _ in range(self.mesh.tp)]
        for dim, s in shards.items():
            for rank, count in enumerate(s.counts):
                shapes[rank][dim] = count
        return joined(self.fabric.group("tp").all_gather(local.detach(), shapes), shards)

    def _copied(self, memo: dict[int, Any]) -> Any:
        """The beginning of a copy for the copy of the module: the same ranks and random streams."""
        model = memo.get(id(self.model))
        if model is None:
            raise AutoTPError("a part of a parallelized model cannot be copied: copy the model, or what holds it")
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.model, copied.agreement, copied.fabric = model, self.agreement, self.fabric
        copied.mesh, copied.tied = self.mesh, self.tied
        copied.own_forward = copy.deepcopy(self.own_forward, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AutoTPError(
            f"a parallelized {type(self.model).__name__} cannot be pickled: save autotp.full_state_dict(model), or "
            "model.state_dict() per rank, and load it into a model made, and parallelized, anew"
        )


class Whole(Runtime):
    """The runtime of a module that runs as one graph a call structure: a model captured whole, or a part.

    Args:
        model: the module.
        programs: its programs, one of them made.
        agreement: how the ranks compare what they do.
        fabric: how they communicate.
    """

    broadcasts = True
    """Whether ranks may take rank 0's inputs in place of others."""

    def __init__(self, model: nn.Module, programs: Programs, agreement: Agreement, fabric: ProcessFabric) -> None:
        super().__init__(model, agreement, fabric)
        self._take(programs)

    def _take(self, programs: Programs) -> None:
        self.programs = programs
        self._between: Between | None = None
        programs.rank = self.mesh.rank
        outer = programs.outer.watch if programs.outer is not None else None
        programs.comparison = Comparison(self.agreement, programs.watch, self.shards, outer, self.broadcasts)

    @property
    def stored(self) -> Mapping[str, Layout]:
        """The split parameters' layouts, by their first names in the module."""
        return self.programs.stored or {}

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Arguments, flat; what objects among them hold may be this rank's parts."""
        return self.programs.arguments(args, kwargs)

    def shards_of(self, name: str, tensor: torch.Tensor) -> dict[int, Shards]:
        """The split dims of a parameter, or of a tensor that the module keeps, of which this rank holds ``tensor``."""
        programs = self.programs
        return self.shards(name) or programs.memory.shards(name, programs.slots, tensor, self.mesh.rank)

    def attach(self) -> None:
        """Let the module run its programs, and its submodules that hold shards programs of their own."""
        super().attach()
        self.programs.cut_state()
        for name, module in self.model.named_modules():
            held = [f"{name}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)]
            if "_autotp" not in module.__dict__ and any(self.shards(n) for n in held):
                inside = Inside(self, name, module)
                install(module, inside, inside)
                module.register_forward_pre_hook(Guard(dotted(self.programs.path, name), self.is_running))
        self.programs.watch.settle()

    def inside(self, name: str, module: nn.Module) -> Whole:
        """The runtime of a submodule that is called by itself."""
        return Whole(module, self.programs.inside(name), self.agreement, self.fabric)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """This rank's part of a call of the module, and the module's own kind of output."""
        try:
            program, of = self.programs.find(args, kwargs)
        except UncapturedError as why:
            self._between = self._between or Between(self)
            return self._between(*why.call, why)
        run = self.programs.graph(program, self.mesh.rank)
        self.before(program.random)
        inference = program.captured.outputs.inference
        with fabric.use(self.fabric), torch.no_grad() if inference else contextlib.nullcontext():
            tensors, seen = of.local(program.inputs, self.mesh.rank), self.programs.watch.seen
            compiled = self.programs.compiled if asked.options is None else asked.options
            results = run.execute(self.programs.lowering, tensors, seen, compiled)
            return program.unflatten(results, of.objects)

    def before(self, random: bool) -> None:
        """What to do before a program runs, which draws random numbers or not."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The runtime of a copy of the model: the same ranks, shards and random streams; graphs are made anew."""
        copied = self._copied(memo)
        copied._take(self.programs.anew(copied.model, copied.model))
        register(copied)
        return copied
