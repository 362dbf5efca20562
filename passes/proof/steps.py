"""steps: one step of a rewritten graph, and the state of a proof: claims of values, arguments read by rank, terms."""

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
from passes.proof.terms import Terms, canonical, with_positive_dims

__all__ = ["Proof", "Rule", "Sizes", "Step", "dims_by_layout", "normalize_dim"]


@dataclass(frozen=True)
class Sizes:
    """A size that the graph computes, on each rank."""

    ranks: tuple[Size, ...]


def normalize_dim(dim: int, rank: int) -> int:
    """A dim counted from the first one.

    Raises:
        Unproved: a value of this rank has no such dim.
    """
    if not -rank <= dim < rank:
        raise Unproved(f"one of {rank} dims", f"dim {dim}", "the program would fail")
    return dim % rank


def dims_by_layout(shape: Sequence[Size], layout: Layout) -> tuple[Dim, ...]:
    """The dims of a parameter, an input or a result, from its layout."""
    dims: list[Dim] = []
    for d, size in enumerate(shape):
        shards = layout.dims.get(d)
        split = None if shards is None else split_of(shards.size, [s.indices for s in shards.ranks])
        dims.append(() if size.is_one else ((size, split),))
    return tuple(dims)


@dataclass
class Step:
    """One call of the rewritten graph: its node, the op's name and target, and its arguments by name."""

    node: fx.Node
    name: str
    target: Any
    args: dict[str, Any]


class Proof:
    """The state of a proof.

    Attributes:
        terms: the expressions of the dense model.
        tp: the number of ranks.
        values: what is known of each node: a claim, several true claims, sizes, or another description.
        choice: the claim under consideration for each node that has several.
        draws: the random values that the step under consideration takes: how they are drawn, and which one.
    """

    def __init__(self, terms: Terms, tp: int) -> None:
        self.terms, self.tp = terms, tp
        self.values: dict[fx.Node, Any] = {}
        self.choice: dict[fx.Node, Claim] = {}
        self.draws: list[tuple[Hashable, int]] = []

    def value(self, node: fx.Node) -> Any:
        """The claim of a node; of several true claims the one under consideration."""
        return self.choice.get(node, self.values.get(node))

    def claim(self, node: Any) -> Claim:
        """The claim of a tensor argument."""
        value = self.value(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, Claim):
            raise Unproved("a tensor", repr(node), "the op cannot be read")
        return value

    def is_tensor(self, value: Any) -> bool:
        """Whether an argument is a tensor."""
        return isinstance(value, fx.Node) and isinstance(self.value(value), Claim)

    def on_rank(self, value: Any, rank: int) -> Any:
        """An argument on one rank; sizes that the graph computes as :class:`Size`."""
        if isinstance(value, PerRank):
            return self.on_rank(value.values[rank], rank)
        if isinstance(value, fx.Node):
            known = self.value(value)
            return known.ranks[rank] if isinstance(known, Sizes) else known
        if isinstance(value, (list, tuple)):
            return tuple(self.on_rank(v, rank) for v in value)
        return value

    def per_rank(self, value: Any) -> list[Any]:
        """An argument on each rank."""
        return [self.on_rank(value, r) for r in range(self.tp)]

    def uniform(self, value: Any, what: str = "this argument") -> Any:
        """An argument that must be the same on all ranks."""
        values = self.per_rank(value)
        if any(x != values[0] for x in values):
            raise Unproved(
                f"{what} to be the same on all ranks", f"{values}", "the ranks would compute different things"
            )
        return values[0]

    def key(self, value: Any) -> Any:
        """An argument in the form that it has in the key of a term."""
        if isinstance(value, fx.Node):
            known = self.value(value)
            if isinstance(known, Claim):
                return ("term", known.term)
            return self.uniform(value) if isinstance(known, Sizes) else known
        if isinstance(value, PerRank):
            return canonical(self.uniform(value))
        if isinstance(value, (list, tuple)):
            return tuple(self.key(v) for v in value)
        return canonical(value)

    def arguments_key(self, args: Mapping[str, Any]) -> Hashable:
        """All arguments in the form that they have in the key of a term."""
        tensors = self.claims(dict(args))
        args = with_positive_dims(args, len(tensors[0].dims) if tensors else 0)
        return tuple(sorted((k, self.key(v)) for k, v in args.items()))

    def claims(self, value: Any) -> list[Claim]:
        """The claims of all tensors among the arguments, in order."""
        if self.is_tensor(value):
            return [self.claim(value)]
        if isinstance(value, dict):
            value = list(value.values())
        return [c for v in value for c in self.claims(v)] if isinstance(value, (list, tuple)) else []

    def find_term(self, key: Hashable, what: str) -> int:
        """The term with this key, which the dense model must compute, too."""
        term = self.terms.find(key)
        if term is None:
            raise Unproved(
                f"{what} that the dense model computes",
                "one that it does not compute",
                "the results would be those of another function",
            )
        return term

    def next_draw(self, key: Hashable) -> int:
        """The next random value that the dense model draws by this op with these arguments."""
        waiting = self.terms.draws.get(key)
        if not waiting:
            raise Unproved(
                "random numbers that the dense model draws", "others", "the dense model would draw other numbers"
            )
        self.draws.append((key, waiting[0]))
        return waiting[0]

    def check_draw(self, step: Step, claim: Claim) -> Claim:
        """A claim that the step may draw random numbers for.

        All ranks must draw the same numbers for a replicated value, and each its own for disjoint shards.
        """
        per_rank = step.node.target.__name__ == "random_per_rank"
        if not (require_reduced(claim).disjoint if per_rank else claim.replicated):
            raise Unproved(
                "shards that share no element" if per_rank else "a replicated value",
                f"one that is {claim}",
                "ranks would drop other elements of the same value",
            )
        return claim

    def call_term(self, step: Step) -> int:
        """The term of a call, which the dense model must make with the same arguments, too."""
        return self.find_term((step.name, self.arguments_key(step.args)), f"a result of {step.name}")


Rule = Callable[[Proof, Step], Any]
"""A function that returns the claim of a step, or several that are all true, or raises :class:`Unproved`."""
