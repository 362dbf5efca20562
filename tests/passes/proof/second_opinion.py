"""A second opinion on a rewritten program: whether it has types by ``spmd-types``, a checker that is not ours.

The first rank's program runs on its own parts of the weights, and the checker follows every op. Along an axis of
ranks a value is R (the same on all, and its gradient a pending sum), I (the same, and so is its gradient), V (each
rank its own) or P (a pending sum). A program has types if no op gets what it may not have and all results are I:
then each collective that is needed is there, once and in its place, forward and backward.

What the checker is told, by us:

* A weight is V where ranks hold different parts of it, and I where they hold the same. Inputs and buffers are I.
  A constant of which each rank has its own is a V number.
* Our autograd functions have rules, as the library's documentation says how (``spmd_typecheck``), made of its own
  transitions: ``enter`` is its I -> R, ``all_reduce`` its P -> I, and so on. The torch around them is checked as it is.
* A product of a rank's parts along a contracted dim is V to the checker until someone declares that it is a term of
  a sum. The program does (``meta["type"]`` is ``P``). A needless or missing declaration is refused further on.
* Where several ranks hold the same of a weight there are two axes: along the replicas, and across them. ``enter``
  over ``tp:0,1|2`` is I -> R along the first, a collective over all ranks is one along both. Axes here are names
  without ranks, so some may have fewer replicas than others. Weights that are replicated in two ways have no types.

What types do not see, and only the proof does: *which* indices a rank holds (a wrong shard, offset or position), a
wrong scale, one value taken for another of the same type. Nor do they see ``enter_overlapping``, which is V -> V:
weights of which ranks hold overlapping parts are V, whether or not the gradients of the overlap are summed. Sizes
that a program reads from a value are plain numbers. No process group is needed: nothing is ever communicated.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import spmd_types as spmd
import torch
from spmd_types import I, P, R, Scalar, SpmdTypeError, V, assert_type, rules
from spmd_types.checker import typecheck
from torch import fx, nn
from torch.overrides import handle_torch_function
from torch.utils import _pytree as pytree

from autotp.program.sharded_program import ShardedProgram
from autotp.weights.slicing import local_part, shards_of
from passes import ops
from passes.layouts.sharded_value import GROUP, PerRank
from passes.ops import collectives as parallel
from passes.ops import context, norms, vocabulary
from passes.ops.context import use_context

__all__ = ["refusal"]


@dataclass(frozen=True)
class Axes:
    """The axes of a program: for each, the parts that the ranks fall into, within which they differ along it alone."""

    parts: Mapping[str, list[list[int]]]

    @staticmethod
    def of(program: ShardedProgram) -> Axes:
        """One axis; two if several ranks hold the same of a weight: along those ranks, and across from such to such."""
        tp = range(program.tp)
        for _, layout in sorted(program.weight_layouts.items()):
            held = [tuple(shards.ranks[rank] for _, shards in layout.shards) for rank in tp]
            alike = [[other for other in tp if held[other] == held[rank]] for rank in tp]
            along = [part for rank, part in enumerate(alike) if part[0] == rank]
            if 1 < len(along) < program.tp:
                across = [[part[i] for part in along if i < len(part)] for i in range(max(map(len, along)))]
                return Axes({"along": along, "across": across})
        return Axes({"across": [list(tp)]})

    def named(self, group: str) -> list[str]:
        """The axes that a collective over a group is along; a group that is none stays unknown to the checker."""
        parts = sorted(context.parse_group(group)[1])
        return [name for name, mine in self.parts.items() if group == GROUP or sorted(mine) == parts] or [group]

    def mesh(self) -> dict[str, spmd.MeshAxis]:
        """The axes for the checker, at right angles to one another."""
        return {name: spmd.MeshAxis.of(2, 2**i) for i, name in enumerate(self.parts)}

    def types(self, values: Sequence[Any], same: Any) -> dict[str, Any]:
        """The type of what each rank has its own of: ``same`` along an axis whose ranks have the same."""
        return {
            name: V if any(values[rank] != values[part[0]] for part in parts for rank in part) else same
            for name, parts in self.parts.items()
        }


@dataclass(frozen=True)
class Alone:
    """The first rank's world, and its end of any group, whose others never come: what it gets has the right shape."""

    tp: int
    axes: Axes
    size: int = 1
    along: Sequence[str] = ()
    rank: int = 0

    def group(self, name: str) -> Alone:
        """The rank's end of a group."""
        parts = context.parse_group(name)[1] or [list(range(self.tp))]
        return replace(self, size=len(next(part for part in parts if 0 in part)), along=self.axes.named(name))

    def random(self, same: bool, device: torch.device) -> AbstractContextManager[None]:
        """Nothing: which numbers they are is all the same."""
        return nullcontext()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor of this shape."""
        return tensor.clone()

    def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """New tensors of these shapes."""
        return [tensor.new_ones(tuple(shape)) for shape in shapes]

    def each(self, step: Callable[..., Any], x: Any, **types: Any) -> Any:
        """A step of the checker's along each axis of the group."""
        return functools.reduce(lambda x, axis: step(x, axis, **types), self.along, x)


# The types of our autograd functions ---------------------------------------------------------------


def _settle(*, x: Any, group: Alone) -> Any:
    for axis in group.along:  # of V the first rank's: a sum in which all others' terms are zeros
        varies = spmd.get_axis_local_type(x, axis) is V
        x = rules.all_reduce(x, axis, src=V, dst=I) if varies else rules.convert(x, axis, src=R, dst=I)
    return x


def _all_gather(out: Any, *, x: Any, places: Any, group: Alone) -> None:
    held = group.axes.types(list(zip(*(runs for _, runs in places), strict=True)), R)
    assert_type(x, {axis: held.get(axis, V) for axis in group.along})
    spmd.assert_type_like(out, x, dict.fromkeys(group.along, I))


def _norm(*, x: Any, weight: Any, bias: Any) -> Any:
    if set(spmd.get_local_type(x).values()) not in ({V}, {V, R}):
        raise SpmdTypeError(f"a norm over shards of {spmd.get_local_type(x)}")
    present = [t for t in (weight, bias) if t is not None]
    return rules.einsum(",".join(["...d"] + ["d"] * len(present)) + "->...d", x, *present)


def _cross_entropy(out: Any, *, logits: Any, target: Any, weight: Any, group: Alone) -> None:
    assert_type(logits, dict.fromkeys(group.along, V))
    for whole in (t for t in (target, weight) if t is not None):
        group.each(rules.convert, whole, src=I, dst=I)
    spmd.assert_type_like(out, logits, dict.fromkeys(group.along, I))


RULES: Mapping[type, Callable[..., Any]] = {
    parallel._AllReduce: lambda *, x, group: group.each(rules.all_reduce, x, src=P, dst=I),
    parallel._Enter: lambda *, tensors, group: tuple(group.each(rules.convert, x, src=I, dst=R) for x in tensors),
    parallel._EnterOverlapping: lambda *, x, group: group.each(rules.reinterpret, x, src=V, dst=V),
    parallel._BroadcastFromFirst: _settle,
    parallel._AllGather: _all_gather,
    norms._Norm: _norm,
    vocabulary._CrossEntropy: _cross_entropy,
}
"""The rule of each, by the names of its arguments."""


@contextmanager
def checking(tp: int, axes: Axes) -> Iterator[None]:
    """Check all ops inside, strictly: a tensor without a type is an error."""
    with ExitStack() as stack:
        for function, rule in RULES.items():
            stack.enter_context(mock.patch.object(function, "spmd_typecheck", staticmethod(rule), create=True))
        for manager in (use_context(Alone(tp, axes)), spmd.set_current_mesh(axes.mesh()), typecheck("strict")):
            stack.enter_context(manager)
        yield


# One rank's program --------------------------------------------------------------------------------


class Typed(fx.Interpreter):
    """Runs the first rank's program, with a type on every tensor."""

    def __init__(self, model: nn.Module, program: ShardedProgram, axes: Axes) -> None:
        super().__init__(model, graph=program.graph)
        self.program, self.axes = program, axes
        self.own = program.captured.constants | program.captured.regions

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An input: the same on all ranks."""
        return assert_type(super().placeholder(target, args, kwargs), I)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A weight: the rank's part of it."""
        whole = self.own[target] if target in self.own else operator.attrgetter(target)(self.module)
        if not isinstance(whole, torch.Tensor):
            return whole
        shards = shards_of(self.program.weight_layouts, target)
        held = [tuple(s.ranks[rank] for s in shards.values()) for rank in range(self.program.tp)]
        with spmd.no_typecheck():
            part = local_part(whole.detach(), shards, 0).clone().requires_grad_(whole.requires_grad)
        return assert_type(part, self.axes.types(held, I))

    def number(self, constant: Any) -> Any:
        """What stands for a constant of the program: for one of which each rank has its own, V numbers."""
        if not isinstance(constant, PerRank):
            return constant
        types = self.axes.types(constant.values, R)
        return pytree.tree_map(lambda n: Scalar(n, types) if type(n) in (int, float) else n, constant.values[0])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An op, as it is; what it makes of nothing that ranks have their own of is the same on all."""
        args, kwargs = pytree.tree_map(self.number, (args, kwargs))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        told = any(isinstance(x, Scalar) for x in leaves)
        is_aten = isinstance(target, torch._ops.OpOverload)
        if is_aten and (not tensors or any(P in spmd.get_local_type(t).values() for t in tensors)):
            target = _public(target)
        elif told and (is_aten or target is ops.take):
            return handle_torch_function(_flat(target, spec), tensors, *leaves)
        result = target(*args, **kwargs)
        made = isinstance(result, torch.Tensor) and not tensors and not told
        return assert_type(result, R) if made else result

    def run_node(self, n: fx.Node) -> Any:
        """A node; where the program declares a term of a sum it is one, along the axes on which it differs."""
        result = super().run_node(n)
        if n.meta.get("type") == "P":
            assert_type(result, {axis: P for axis, found in spmd.get_local_type(result).items() if found is V})
        return result


def _public(op: Any) -> Any:
    """The function of torch's interface with an operator's name: by those the checker knows which ops are linear."""
    name = op.overloadpacket.__name__.removeprefix("sym_")
    return getattr(torch, name, None) or getattr(torch.Tensor, name, op)


def _flat(op: Any, spec: Any) -> Callable[..., Any]:
    """An op that is called with the leaves of its arguments: inside of lists the checker sees no V numbers."""

    @functools.wraps(op, assigned=("__name__",))
    def called(*leaves: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return op(*args, **kwargs)

    return called


def refusal(model: nn.Module, program: ShardedProgram, inputs: Any) -> str | None:
    """Why a program has no types, or None if it has."""
    axes = Axes.of(program)
    tensors = [x.view_as(x) for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    with checking(program.tp, axes):
        try:
            for result in (x for x in Typed(model, program, axes).run(*tensors) if isinstance(x, torch.Tensor)):
                if not result.requires_grad:  # without a gradient R is as good as I
                    for axis in axes.parts:
                        spmd.reinterpret_no_grad(result, axis, dst=I)
                assert_type(result, I)
        except SpmdTypeError as error:
            return str(error)
    return None
