"""Programs by call structure: a graph holds for one, and a new one is captured on the spot."""

from __future__ import annotations

import contextlib
import enum
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autotp.agreement import Agreement, checksum, digest
from autotp.capture import Dense, capture, flatten_call
from autotp.errors import CaptureError
from autotp.rewrite import RankGraph, Rewritten, rewrite
from autotp.watch import Watch
from passes import Layout

__all__ = ["Programs"]

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(...), enum.Enum, torch.dtype, torch.device,
              torch.layout, torch.memory_format, torch.Size, slice, range)  # fmt: skip

_MANY = 16
"""How many captures of one model are no surprise."""


def _constant(x: Any) -> tuple[type, str]:
    """The part of a call's key that an argument which is no tensor makes.

    Raises:
        CaptureError: it is something whose content could change unseen.
    """
    if not isinstance(x, _CONSTANTS):
        raise CaptureError(
            f"an argument is, or holds, a {type(x).__module__}.{type(x).__qualname__}, whose content autotp cannot "
            "see: pass tensors, numbers and strings, in tuples, lists and dicts, or register the class with "
            "torch.utils._pytree.register_pytree_node"
        )
    return type(x), repr(x)


def _usable(x: torch.Tensor) -> torch.Tensor:
    return x.clone() if x.is_inference() else x


def _paths(leaves: list[Any], spec: Any) -> list[str]:
    """``args[0]``, ``kwargs['input_ids']``: what the caller calls each leaf."""
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return [
        name + pytree.keystr(path)
        for name, part in (("args", args), ("kwargs", kwargs))
        for path, _ in pytree.tree_flatten_with_path(part)[0]
    ]


class Programs:
    """The rewritten programs of one model, by call structure.

    A structure is: which arguments there are and which are None, the constants among them, dtypes,
    which dims are of size one, train or eval, the weights' dtypes, plain attributes that were changed. The
    first program decides how the weights are split; the others follow.

    Attributes:
        stored: the weights' layouts, once the first program is made.
        captures: how many times the model has been captured.
        rank: the rank whose shards the model's parameters are; None while they are whole.
        agreement: through which the ranks compare each call; None for one process.
        debug: whether they compare the values of inputs and of whole parameters, too.
        steps: how many steps optimizers have taken.
    """

    def __init__(self, model: nn.Module, tp: int, dense: Dense, stored: Mapping[str, Layout] | None = None) -> None:
        self.model, self.tp, self.dense, self.stored = model, tp, dense, stored
        self.captures = 0
        self._by_structure: dict[Any, list[Rewritten]] = {}
        self._graphs: dict[tuple[int, int], RankGraph] = {}
        self._digests: dict[Any, int] = {}
        self.watch = Watch(model, self.shape)
        self.last: Rewritten | None = None
        self.rank: int | None = None
        self.agreement: Agreement | None = None
        self.debug, self.steps = False, 0

    def shape(self, name: str) -> Sequence[int]:
        """The shape that a parameter has here."""
        whole = self.dense.shapes[name]
        layout = (self.stored or {}).get(name)
        return whole if self.rank is None or layout is None else layout.local_shape(whole, self.rank)

    def structure(self, leaves: list[Any], spec: Any) -> Any:
        """The key of a call."""
        described = tuple(
            (x.dtype, x.device.type, tuple(n == 1 for n in x.shape)) if isinstance(x, torch.Tensor) else _constant(x)
            for x in leaves
        )
        return described, spec, self.watch.look(), torch.is_autocast_enabled()

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Rewritten, list[torch.Tensor]]:
        """The program for a call, made now if there is none, and the call's tensors in its order.

        Raises:
            MismatchError: the ranks call differently. All raise, and none has begun.
            CaptureError: the call cannot be captured.
            AutoTPError: the model was changed in a way that its graphs cannot follow.
        """
        leaves, spec = flatten_call(args, kwargs)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        key, error = None, None
        try:
            key = self.structure(leaves, spec)
        except Exception as raised:
            error = raised
        if self.agreement is not None:
            self._agree(self.agreement, key, spec, leaves, error)
        elif error is not None:
            raise error
        for program in self._by_structure.get(key, ()):
            if program.fits(tensors):
                return program, tensors
        agreed = self.agreement.mesh.together("capturing this call") if self.agreement else contextlib.nullcontext()
        with agreed:
            program = self._made(args, kwargs, key)
        if self.agreement is not None:
            constants = {n: checksum(t) for n, t in program.captured.constants.items()}
            text = f"{program.graph} {constants}"
            self.agreement.check("capture", digest(text), lambda: {"the graph": f"{digest(text):x}"})
        self.stored = program.stored
        self._by_structure.setdefault(key, []).append(program)
        self.last = program
        return program, tensors

    def _agree(self, agreement: Agreement, key: Any, spec: Any, leaves: list[Any], error: Exception | None) -> None:
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        shapes = tuple([(x.shape, x.requires_grad) for x in tensors])
        facts = (shapes, torch.is_grad_enabled(), self.watch.trainable())
        fingerprint = 0
        if error is None:
            fingerprint = self._digests.get((key, facts), 0)
            if not fingerprint:
                if len(self._digests) > 4096:
                    self._digests.clear()
                fingerprint = self._digests[key, facts] = digest(repr((key, facts)))
        values = self._values(leaves, spec) if self.debug else {}
        fingerprint = digest(f"{fingerprint} {self.steps} {values}")
        agreement.check("call", fingerprint, lambda: self._described(leaves, spec) | values, error)

    def _values(self, leaves: list[Any], spec: Any) -> dict[str, str]:
        """Checksums of the inputs, and of the parameters of which every rank holds the whole."""
        named = dict(zip(_paths(leaves, spec), leaves, strict=True))
        split = {n for n, layout in (self.stored or {}).items() if not layout.whole}
        named |= {f"parameter {n}": p for n, p in self.model.named_parameters() if n not in split}
        return {f"values of {n}": f"{checksum(x):x}" for n, x in named.items() if isinstance(x, torch.Tensor)}

    def _described(self, leaves: list[Any], spec: Any) -> dict[str, str]:
        """A call in words, for ranks that differ."""
        found = {"structure of the inputs": " ".join(str(spec).split())}
        for path, x in zip(_paths(leaves, spec), leaves, strict=True):
            grad = ", requires_grad" if isinstance(x, torch.Tensor) and x.requires_grad else ""
            found[path] = f"{tuple(x.shape)} {x.dtype}{grad}" if isinstance(x, torch.Tensor) else repr(x)
        found["gradients"] = "enabled" if torch.is_grad_enabled() else "disabled"
        found["steps of optimizers"] = str(self.steps)
        found["autocast"] = str(torch.is_autocast_enabled())
        for name, module in self.model.named_modules():
            found[f"mode of {name or 'the model'}"] = "train" if module.training else "eval"
        for name, p in self.model.named_parameters():
            found[f"parameter {name}"] = f"{p.dtype}{', requires_grad' if p.requires_grad else ''}"
        return found | {f"{'.'.join(filter(None, place))}": value for place, value in self.watch.changes().items()}

    def _made(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], key: Any) -> Rewritten:
        if (changes := self.watch.changes()) and self.captures >= _MANY:
            names = ", ".join(".".join(filter(None, place)) for place in changes)
            warnings.warn(
                f"the model is captured for the {self.captures + 1}th time, because these attributes changed: {names}. "
                "A graph holds for their values; do not keep counters on modules",
                stacklevel=2,
            )
        with torch.inference_mode(False):  # the graph, and its constants, will serve in training too
            args, kwargs = pytree.tree_map_only(torch.Tensor, _usable, (args, kwargs))
            captured = capture(self.model, args, kwargs, self.dense)
        self.captures += 1
        program = rewrite(captured, self.tp, self.stored)
        self.watch.settle()  # what capture itself leaves behind is in the graph
        return program

    def graph(self, program: Rewritten, rank: int) -> RankGraph:
        """One rank's graph of a program."""
        key = (id(program), rank)
        if key not in self._graphs:
            self._graphs[key] = RankGraph(program, rank, self.model)
        return self._graphs[key]
