"""The plan: what each weight becomes, what is communicated, and why. A value to print, save and feed back."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import nn

from autotp.capture.graph_breaks import GraphBreak, folded_breaks
from autotp.errors import PlanError
from autotp.modules.names import block_of, folded_text
from autotp.utils.tables import bytes_text, render
from passes import IndexSet, Layout, Shards

__all__ = [
    "Collective",
    "Plan",
    "Weight",
    "collectives_table",
    "obstacles_text",
    "plan_text",
    "ranks_table",
    "totals",
    "weights_table",
]


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
    seams: tuple[GraphBreak, ...] = ()

    @property
    def weight_layouts(self) -> dict[str, Layout]:
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
        seams = tuple(GraphBreak(**s) for s in data["seams"])
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
        return plan_text(self)


def _table(title: str, *columns: str) -> Table:
    """An empty table; a column whose name ends in ``>`` is set to the right."""
    table = Table(title=title, title_justify="left", pad_edge=False, box=None)
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left")
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _local(w: Weight, tp: int) -> str:
    shapes = list(dict.fromkeys(w.local_shape(r) for r in range(tp)))
    return " / ".join(_shape(s) for s in shapes)


def _folded(plan: Plan) -> list[tuple[Weight, int]]:
    """The weights with those of repeated blocks counted as one."""
    found: dict[tuple, list[Weight]] = defaultdict(list)
    for w in plan.weights:
        found[block_of(w.name), w.shape, w.style, _local(w, plan.tp), w.why.split(" (")[0]].append(w)
    return [(ws[0], len(ws)) for ws in found.values()]


def weights_table(plan: Plan) -> Table:
    """Every weight, repeated blocks folded: its shape, what a rank holds, how, and why."""
    table = _table(f"{plan.model} on {plan.tp} ranks", "weight", "times>", "dense", "local", "as", "why")
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.header in ("times", "dense", "as")
    for w, times in _folded(plan):
        name = block_of(w.name) if times > 1 else w.name
        table.add_row(name, str(times), _shape(w.shape), _local(w, plan.tp), w.style, w.why)
    return table


def collectives_table(plan: Plan) -> Table:
    """The collectives of a step, by block and direction, at the example inputs' size."""
    table = _table("collectives at the example inputs' size", "where", "when", "what", "group", "times>", "bytes each>")
    counts: Counter[tuple[str, str, str, str, int]] = Counter()
    for c in plan.collectives:
        counts[block_of(c.module) or "(root)", c.when, c.kind, c.group, c.bytes] += 1
    for (where, when, kind, group, size), times in counts.items():
        table.add_row(where, when, kind, group, str(times), bytes_text(size))
    return table


def ranks_table(plan: Plan) -> Table:
    """What each rank holds, against the dense model."""
    table = _table("what each rank holds", "rank>", "parameters>", "bytes>", "of dense>")
    total = max(plan.bytes(), 1)
    table.add_row("dense", f"{plan.parameters():,}", bytes_text(plan.bytes()), "100%")
    for rank in range(plan.tp):
        held = plan.bytes(rank)
        table.add_row(str(rank), f"{plan.parameters(rank):,}", bytes_text(held), f"{100 * held / total:.1f}%")
    return table


def totals(plan: Plan) -> str:
    """One paragraph of totals."""
    sizes = {when: sum(c.bytes for c in plan.collectives if c.when == when) for when in ("forward", "backward")}
    whole = [w for w in plan.weights if not w.shards]
    counts = [
        f"{plan.count(when)} in a {when} ({bytes_text(sizes[when])}; at least {fewest}, {bytes_text(size)})"
        for when, (fewest, size) in plan.fewest.items()
    ]
    lines = [
        f"collectives: {', '.join(counts)}",
        f"split: {100 * plan.share_split:.1f}% of the elements of weights with two or more dims; "
        f"{len(whole)} weights of {sum(w.elements for w in whole):,} elements stay whole",
    ]
    if plan.obstacles:
        lines.append(obstacles_text(plan))
    if plan.seams:
        lines += ["not captured as one graph; seams at", *(f"  {seam}" for seam in folded_breaks(plan.seams))]
    if plan.gathered:
        lines.append("made whole: " + ", ".join(plan.gathered))
    return "\n".join(lines)


def obstacles_text(plan: Plan) -> str:
    """What a user is told of weights that stay whole because they have too few pieces for the ranks: each with its
    share of the parameters, the reason, the most ranks that would do, and the line of the model's code."""
    total, found = max(plan.parameters(), 1), plan.obstacles
    share = sum(w.elements for w in found) / total
    some = f"{len(found)} weights" if len(found) > 1 else "a weight"
    stay = "stay" if len(found) > 1 else "stays"
    lines = [f"{plan.model}: {some}, {share:.1%} of the parameters, {stay} whole on each of {plan.tp} ranks:"]
    folded: dict[tuple, list[Weight]] = defaultdict(list)
    for w in found:
        folded[block_of(w.name), folded_text(w.why), w.limit].append(w)
    for (name, _, limit), each in folded.items():
        some = f"{len(each)} x {name}" if len(each) > 1 else each[0].name
        of = sum(w.elements for w in each) / total
        fits = f"tp up to {limit} would split it" if limit > 1 else "no tp would split it"
        lines.append(f"  {some} ({of:.1%}): {each[0].why}; {fits}")
    limits = [w.limit for w in found if w.limit and w.limit > 1]
    if limits:
        lines.append(f"tp = 1 to {min(limits)} would split {'all' if len(limits) == len(found) else 'more'} of them.")
    return "\n".join(lines)


def plan_text(plan: Plan) -> str:
    """A plan as tables."""
    return render(weights_table(plan), "", collectives_table(plan), "", ranks_table(plan), "", totals(plan))
