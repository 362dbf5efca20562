"""The plan: what each weight becomes, what is communicated, and why. A value to print, save and feed back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from autotp.errors import PlanError
from autotp.parts import Seam
from passes import IndexSet, Layout, Shards

__all__ = ["Collective", "Plan", "Weight", "block_of", "folded_text"]


@dataclass(frozen=True)
class Weight:
    """One parameter of the plan.

    Attributes:
        name: its fully qualified name.
        shape: its dense shape.
        itemsize: bytes an element.
        style: ``column``, ``row``, ``vocabulary``, ``split`` (by another op) or ``whole``.
        shards: the split dims.
        why: the reason.
        limit: of a weight that is whole because it has too few pieces for the ranks: the most ranks that it could
            be split over; 1 if over none. None else.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    style: str
    shards: Mapping[int, Shards]
    why: str
    limit: int | None = None

    @property
    def elements(self) -> int:
        """Elements of the dense weight."""
        return math.prod(self.shape)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """The shape that a rank holds."""
        return tuple(len(self.shards[d].ranks[rank]) if d in self.shards else n for d, n in enumerate(self.shape))


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Attributes:
        kind: ``all_reduce`` or ``all_gather``.
        when: ``forward`` or ``backward``.
        of: the rewritten graph's node.
        module: the module it stands in.
        elements: the size of its result at the example inputs' size.
        itemsize: bytes an element.
        group: the group's name.
    """

    kind: str
    when: str
    of: str
    module: str
    elements: int
    itemsize: int
    group: str

    @property
    def bytes(self) -> int:
        """The size of its result in bytes, at the example inputs' size."""
        return self.elements * self.itemsize


@dataclass(frozen=True)
class Plan:
    """What autotp will do to a model: every weight's layout and why, and every collective.

    ``print`` it for a table; :meth:`save` and :meth:`load` it as JSON; pass it to
    ``autotp.parallelize(model, tp, plan=plan)``.

    Attributes:
        model: the model's class.
        tp: the number of ranks.
        weights: its parameters.
        collectives: what a forward and a backward communicate.
        fewest: for ``forward`` and ``backward`` the fewest collectives that these layouts leave possible, and
            their bytes at the example inputs' size (:func:`passes.minimum`).
        gathered: split values that some op needs whole.
        seams: where capture ended.
    """

    model: str
    tp: int
    weights: tuple[Weight, ...]
    collectives: tuple[Collective, ...]
    fewest: Mapping[str, tuple[int, int]]
    gathered: tuple[str, ...] = ()
    seams: tuple[Seam, ...] = ()

    @property
    def stored(self) -> dict[str, Layout]:
        """The split weights' layouts, by name, as the passes take them."""
        return {w.name: Layout.of(dict(w.shards)) for w in self.weights if w.shards}

    def parameters(self, rank: int | None = None) -> int:
        """How many parameters a rank holds; the dense model for None."""
        return sum(math.prod(w.shape if rank is None else w.local_shape(rank)) for w in self.weights)

    def bytes(self, rank: int | None = None) -> int:
        """How many bytes of parameters a rank holds; the dense model for None."""
        return sum(w.itemsize * math.prod(w.shape if rank is None else w.local_shape(rank)) for w in self.weights)

    @property
    def share_split(self) -> float:
        """The share of the elements of weights with two dims or more that are split."""
        matrices = [w for w in self.weights if len(w.shape) > 1]
        return sum(w.elements for w in matrices if w.shards) / max(sum(w.elements for w in matrices), 1)

    def count(self, when: str) -> int:
        """The number of collectives in a ``forward`` or a ``backward``."""
        return sum(c.when == when for c in self.collectives)

    @property
    def obstacles(self) -> list[Weight]:
        """The weights that stay whole because they have too few pieces for the ranks, or none."""
        return [w for w in self.weights if w.limit is not None]

    def check(self, model: nn.Module, tp: int) -> None:
        """Raise if the plan is not for this model and this number of ranks.

        Raises:
            PlanError: it says what differs.
        """
        if self.tp != tp:
            raise PlanError(f"the plan is for tp={self.tp}, not for tp={tp}: make one with autotp.plan(model, {tp})")
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        mine = {w.name: w.shape for w in self.weights}
        for name in sorted(shapes.keys() | mine.keys()):
            if shapes.get(name) != mine.get(name):
                raise PlanError(
                    f"the plan is for another model: {name} has shape {mine.get(name, 'none')} in the plan and "
                    f"{shapes.get(name, 'none')} in the model"
                )

    def to_json(self) -> str:
        """The plan as JSON."""
        weights = [
            {
                "name": w.name,
                "shape": list(w.shape),
                "itemsize": w.itemsize,
                "style": w.style,
                "why": w.why,
                "limit": w.limit,
                "local_shapes": [list(w.local_shape(r)) for r in range(self.tp)],
                "shards": {str(d): [[list(run) for run in s.runs] for s in sh.ranks] for d, sh in w.shards.items()},
            }
            for w in self.weights
        ]
        collectives = [{**vars(c), "bytes": c.bytes} for c in self.collectives]
        totals = {
            "parameters": self.parameters(),
            "bytes": self.bytes(),
            "parameters_per_rank": [self.parameters(r) for r in range(self.tp)],
            "bytes_per_rank": [self.bytes(r) for r in range(self.tp)],
            "collectives_forward": self.count("forward"),
            "collectives_backward": self.count("backward"),
            "share_of_matrices_split": self.share_split,
        }
        return json.dumps({"model": self.model, "tp": self.tp, "totals": totals, "weights": weights,
                           "collectives": collectives, "fewest": dict(self.fewest), "gathered": list(self.gathered),
                           "seams": [vars(s) for s in self.seams]}, indent=1)  # fmt: skip

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that :meth:`to_json` wrote."""
        data = json.loads(text)
        weights = []
        for w in data["weights"]:
            shape = tuple(w["shape"])
            shards = {
                int(d): Shards(shape[int(d)], tuple(IndexSet(tuple((a, b) for a, b in runs)) for runs in ranks))
                for d, ranks in w["shards"].items()
            }
            weights.append(Weight(w["name"], shape, w["itemsize"], w["style"], shards, w["why"], w["limit"]))
        collectives = [Collective(**{k: v for k, v in c.items() if k != "bytes"}) for c in data["collectives"]]
        fewest = {when: (count, size) for when, (count, size) in data["fewest"].items()}
        seams = tuple(Seam(**s) for s in data["seams"])
        gathered = tuple(data["gathered"])
        return Plan(data["model"], data["tp"], tuple(weights), tuple(collectives), fewest, gathered, seams)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote."""
        return Plan.from_json(Path(path).read_text())

    def __str__(self) -> str:
        from autotp.report import plan_text

        return plan_text(self)


def block_of(path: str) -> str:
    """A module path with numbers replaced, so that repeats of a block have one name: ``layers.*.mlp``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def folded_text(text: str) -> str:
    """A text in which the module paths of repeats of a block have one name."""
    return " ".join(block_of(word) if "." in word else word for word in text.split(" "))
