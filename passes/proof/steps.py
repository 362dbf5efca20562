"""Steps: what a proof keeps while it walks a rewritten graph, and what every rule asks of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes.layouts.axes import Size
from passes.layouts.layout import Layout
from passes.layouts.sharded_value import PerRank
from passes.proof.claims import Claim, Dim, Unproved, split_of
from passes.proof.results import require_reduced
from passes.proof.terms import Terms, canonical, with_dims

__all__ = ["Proof", "Rule", "Sizes", "Step", "axis", "dims_by_layout"]


@dataclass(frozen=True)
class Sizes:
    """A size computed in the graph: each rank's own."""

    ranks: tuple[Size, ...]


def axis(dim: int, rank: int) -> int:
    """A dim of a value counted from the first; it must have it."""
    if not -rank <= dim < rank:
        raise Unproved(f"one of {rank} dims", f"dim {dim}", "the program would fail")
    return dim % rank


def dims_by_layout(shape: Sequence[Size], layout: Layout) -> tuple[Dim, ...]:
    """What ranks hold of a parameter, from its layout on its dims."""
    found: list[Dim] = []
    for d, size in enumerate(shape):
        shards = layout.dims.get(d)
        split = None if shards is None else split_of(shards.size, [s.indices for s in shards.ranks])
        found.append(() if size.is_one else ((size, split),))
    return tuple(found)


@dataclass
class Step:
    """One call of the rewritten graph: its op's name and target, and its arguments by name."""

    node: fx.Node
    name: str
    target: Any
    args: dict[str, Any]


class Proof:
    """The claims proved so far."""

    def __init__(self, terms: Terms, tp: int) -> None:
        self.terms, self.tp = terms, tp
        self.values: dict[fx.Node, Any] = {}
        self.chosen: dict[fx.Node, Claim] = {}
        self.draws: list[tuple[Hashable, int]] = []

    def value(self, node: fx.Node) -> Any:
        """What is known of a node; of several true claims the one at hand."""
        return self.chosen.get(node, self.values.get(node))

    def claim(self, node: Any) -> Claim:
        """The claim of a tensor argument."""
        found = self.value(node) if isinstance(node, fx.Node) else None
        if not isinstance(found, Claim):
            raise Unproved("a tensor", repr(node), "the op cannot be read")
        return found

    def is_tensor(self, value: Any) -> bool:
        """Whether an argument is a tensor."""
        return isinstance(value, fx.Node) and isinstance(self.value(value), Claim)

    def at(self, value: Any, rank: int) -> Any:
        """An argument as one rank has it; sizes computed in the graph as :class:`Size`."""
        if isinstance(value, PerRank):
            return self.at(value.values[rank], rank)
        if isinstance(value, fx.Node):
            found = self.value(value)
            return found.ranks[rank] if isinstance(found, Sizes) else found
        if isinstance(value, (list, tuple)):
            return tuple(self.at(v, rank) for v in value)
        return value

    def ranks(self, value: Any) -> list[Any]:
        """An argument on each rank."""
        return [self.at(value, r) for r in range(self.tp)]

    def same(self, value: Any, what: str = "this argument") -> Any:
        """An argument that all ranks must have alike."""
        each = self.ranks(value)
        if any(x != each[0] for x in each):
            raise Unproved(f"{what} to be the same on all ranks", f"{each}", "the ranks would compute different things")
        return each[0]

    def key(self, value: Any) -> Any:
        """An argument as in the key of a term."""
        if isinstance(value, fx.Node):
            found = self.value(value)
            if isinstance(found, Claim):
                return ("term", found.term)
            return self.same(value) if isinstance(found, Sizes) else found
        if isinstance(value, PerRank):
            return canonical(self.same(value))
        if isinstance(value, (list, tuple)):
            return tuple(self.key(v) for v in value)
        return canonical(value)

    def named(self, args: Mapping[str, Any]) -> Hashable:
        """All arguments as in the key of a term."""
        tensors = self.tensors(dict(args))
        args = with_dims(args, len(tensors[0].dims) if tensors else 0)
        return tuple(sorted((k, self.key(v)) for k, v in args.items()))

    def tensors(self, value: Any) -> list[Claim]:
        """The claims of all tensors among arguments, in order."""
        if self.is_tensor(value):
            return [self.claim(value)]
        if isinstance(value, dict):
            value = list(value.values())
        return [c for v in value for c in self.tensors(v)] if isinstance(value, (list, tuple)) else []

    def known(self, key: Hashable, what: str) -> int:
        """The term of an atom that the dense model computes too."""
        term = self.terms.find(key)
        if term is None:
            raise Unproved(
                f"{what} that the dense model computes",
                "one that it does not",
                "the values would be of another function",
            )
        return term

    def drawn(self, key: Hashable) -> int:
        """The next random value that the dense model draws in this way."""
        waiting = self.terms.draws.get(key)
        if not waiting:
            raise Unproved("random numbers that the dense model draws", "others", "they would be drawn anew")
        self.draws.append((key, waiting[0]))
        return waiting[0]

    def drawn_from(self, step: Step, claim: Claim) -> Claim:
        """A claim that random numbers may go with: all ranks draw the same for what is whole, own ones for parts."""
        per_rank = step.node.target.__name__ == "random_per_rank"
        if not (require_reduced(claim).apart if per_rank else claim.whole):
            raise Unproved(
                "parts that no two ranks hold" if per_rank else "a whole value",
                f"one that is {claim}",
                "ranks would drop other elements of the same value",
            )
        return claim

    def called(self, step: Step) -> int:
        """The term of a step that the dense model takes with the same arguments."""
        return self.known((step.name, self.named(step.args)), f"a result of {step.name}")


Rule = Callable[[Proof, Step], Any]
"""What gives the claim of a step, or several that are all true; it raises :class:`Unproved`."""
