"""Programs by call structure: a graph holds for one, and a new one is captured on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autotp.capture import Captured, Dense, capture, flatten_call
from autotp.rewrite import RankGraph, Rewritten, rewrite
from passes import Layout

__all__ = ["Programs"]


class Programs:
    """The rewritten programs of one module, by call structure.

    A structure is: which arguments there are and which are None, the constants among them, dtypes,
    which need a gradient, which dims are of size one, train or eval, the weights' dtypes. The first
    program decides how the weights are split; the others follow.

    Attributes:
        stored: the weights' layouts, once the first program is made.
        settled: the layouts of those weights about which the first program has no say.
        captures: how many times the module has been captured.
    """

    def __init__(
        self,
        model: nn.Module,
        tp: int,
        dense: Dense,
        stored: Mapping[str, Layout] | None = None,
    ) -> None:
        self.model, self.tp, self.dense, self.stored = model, tp, dense, stored
        self.settled: Mapping[str, Layout] = {}
        self.captures = 0
        self._captured: dict[Any, list[Captured]] = {}
        self._by_structure: dict[Any, list[Rewritten]] = {}
        self._graphs: dict[tuple[int, int], RankGraph] = {}
        self._modules = list(model.modules())
        self._parameters = list(model.parameters())
        self.last: Rewritten | None = None

    def settle(self, settled: Mapping[str, Layout]) -> None:
        """Give the layouts of some weights, before any call or to make all programs anew."""
        self.settled, self.stored = settled, None
        self._by_structure.clear()
        self._graphs.clear()

    def structure(self, leaves: list[Any], spec: Any) -> Any:
        """The key of a call."""
        described = tuple(
            (x.dtype, x.device.type, x.requires_grad, tuple(n == 1 for n in x.shape))
            if isinstance(x, torch.Tensor)
            else (type(x), x)
            for x in leaves
        )
        return (
            described,
            spec,
            tuple([m.training for m in self._modules]),
            frozenset([p.dtype for p in self._parameters]),
            torch.is_autocast_enabled(),
        )

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
        """The captured graph of a call, made now if there is none."""
        leaves, spec = flatten_call(args, kwargs)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        known = self._captured.setdefault(self.structure(leaves, spec), [])
        for captured in known:
            if captured.fits(tensors):
                return captured
        captured = capture(self.model, args, kwargs, self.dense)
        self.captures += 1
        known.append(captured)
        return captured

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Rewritten, list[torch.Tensor]]:
        """The program for a call, made now if there is none, and the call's tensors in its order."""
        leaves, spec = flatten_call(args, kwargs)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        key = self.structure(leaves, spec)
        for program in self._by_structure.get(key, ()):
            if program.captured.fits(tensors):
                return program, tensors
        program = rewrite(self.capture(args, kwargs), self.tp, self.stored, self.settled)
        self.stored = program.stored
        self._by_structure.setdefault(key, []).append(program)
        self.last = program
        return program, tensors

    def graph(self, program: Rewritten, rank: int) -> RankGraph:
        """One rank's graph of a program."""
        key = (id(program), rank)
        if key not in self._graphs:
            self._graphs[key] = RankGraph(program, rank, self.model)
        return self._graphs[key]
