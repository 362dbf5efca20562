"""plan: the layout of each weight, the collectives, and the reasons; a value to print, save, load and follow."""

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
from autotp.utils.renamed import renamed
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
        style: how it is split: ``column``, ``row``, ``vocabulary``, ``split`` (by another op), or ``whole`` (unsplit).
        shards: the split dims.
        why: the reason.
        limit: the most ranks that an unsplit weight could be split over, 1 if over none. None for a weight that is
            split, or unsplit for another reason than too few pieces for the ranks.
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
        """The shape of a rank's shard."""
        return tuple(len(self.shards[d].ranks[rank]) if d in self.shards else n for d, n in enumerate(self.shape))


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Attributes:
        kind: ``all_reduce`` or ``all_gather``.
        when: ``forward`` or ``backward``.
        of: the name of its node in the rewritten graph.
        module: the module that the node belongs to.
        elements: the number of elements of its result, for the example inputs.
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
        """The number of bytes of its result, for the example inputs."""
        return self.elements * self.itemsize


class _OldNames:
    """Names that the attributes of a plan had before version 0.2."""

    seams = renamed("seams", "graph_breaks")
    stored = renamed("stored", "weight_layouts")


@dataclass(frozen=True)
class Plan(_OldNames):
    """The plan for a model: each weight's layout with its reason, and each collective.

    ``print`` it for a table; :meth:`save` and :meth:`load` it as JSON; pass it to
    ``autotp.parallelize(model, tp, plan=plan)``.

    Attributes:
        model: the model's class.
        tp: the number of ranks.
        weights: its parameters.
        collectives: the collectives of a forward and a backward.
        fewest: for ``forward`` and ``backward`` the fewest collectives that these layouts leave possible, and
            their bytes for the example inputs (:func:`passes.minimum`).
        gathered: sharded values that are all-gathered for an op that needs all of them.
        graph_breaks: the places where capture ended.
    """

    model: str
    tp: int
    weights: tuple[Weight, ...]
    collectives: tuple[Collective, ...]
    fewest: Mapping[str, tuple[int, int]]
    gathered: tuple[str, ...] = ()
    graph_breaks: tuple[GraphBreak, ...] = ()

    @property
    def weight_layouts(self) -> dict[str, Layout]:
        """The layouts of the split weights, by name."""
        return {w.name: Layout.of(dict(w.shards)) for w in self.weights if w.shards}

    def parameters(self, rank: int | None = None) -> int:
        """The number of parameters that a rank holds, or the dense model for None."""
        return sum(math.prod(w.shape if rank is None else w.local_shape(rank)) for w in self.weights)

    def bytes(self, rank: int | None = None) -> int:
        """The bytes of parameters that a rank holds, or the dense model for None."""
        return sum(w.itemsize * math.prod(w.shape if rank is None else w.local_shape(rank)) for w in self.weights)

    @property
    def share_split(self) -> float:
        """The fraction of matrix elements (weights with two dims or more) that belong to split weights."""
        matrices = [w for w in self.weights if len(w.shape) > 1]
        return sum(w.elements for w in matrices if w.shards) / max(sum(w.elements for w in matrices), 1)

    def count(self, when: str) -> int:
        """The number of collectives in a ``forward`` or a ``backward``."""
        return sum(c.when == when for c in self.collectives)

    @property
    def obstacles(self) -> list[Weight]:
        """The weights that stay unsplit because they have too few pieces for the ranks, or cannot be split."""
        return [w for w in self.weights if w.limit is not None]

    def check(self, model: nn.Module, tp: int) -> None:
        """Raise if the plan is not for this model and this number of ranks.

        Raises:
            PlanError: the message names the mismatch.
        """
        if self.tp != tp:
            raise PlanError(f"the plan is for tp={self.tp}, not for tp={tp}: make one with autotp.plan(model, {tp})")
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        planned = {w.name: w.shape for w in self.weights}
        for name in sorted(shapes.keys() | planned.keys()):
            if shapes.get(name) != planned.get(name):
                raise PlanError(
                    f"the plan is for another model: {name} has shape {planned.get(name, 'none')} in the plan and "
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
                           "graph_breaks": [vars(b) for b in self.graph_breaks]}, indent=1)  # fmt: skip

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that :meth:`to_json` wrote, in this version or in 0.1, where graph breaks were called seams."""
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
        graph_breaks = tuple(GraphBreak(**b) for b in data.get("graph_breaks", data.get("seams", ())))
        gathered = tuple(data["gathered"])
        return Plan(data["model"], data["tp"], tuple(weights), tuple(collectives), fewest, gathered, graph_breaks)

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
    """An empty table; a column whose name ends in ``>`` is aligned to the right."""
    table = Table(title=title, title_justify="left", pad_edge=False, box=None)
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left")
    return table


def _shape(shape: tuple[int, ...]) -> str:
    """A shape as text: ``64x32``."""
    return "x".join(map(str, shape)) or "scalar"


def _local(w: Weight, tp: int) -> str:
    """The distinct shapes of a weight's shards as text."""
    shapes = list(dict.fromkeys(w.local_shape(r) for r in range(tp)))
    return " / ".join(_shape(s) for s in shapes)


def _folded(plan: Plan) -> list[tuple[Weight, int]]:
    """The weights, those of repeated blocks as one with their number."""
    groups: dict[tuple, list[Weight]] = defaultdict(list)
    for w in plan.weights:
        groups[block_of(w.name), w.shape, w.style, _local(w, plan.tp), w.why.split(" (")[0]].append(w)
    return [(group[0], len(group)) for group in groups.values()]


def weights_table(plan: Plan) -> Table:
    """The weights, repeated blocks folded: dense shape, shapes of the shards, style, reason."""
    table = _table(f"{plan.model} on {plan.tp} ranks", "weight", "times>", "dense", "local", "as", "why")
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.header in ("times", "dense", "as")
    for w, times in _folded(plan):
        name = block_of(w.name) if times > 1 else w.name
        table.add_row(name, str(times), _shape(w.shape), _local(w, plan.tp), w.style, w.why)
    return table


def collectives_table(plan: Plan) -> Table:
    """The collectives of a step by block and direction, for the example inputs."""
    table = _table("collectives at the example inputs' size", "where", "when", "what", "group", "times>", "bytes each>")
    counts: Counter[tuple[str, str, str, str, int]] = Counter()
    for c in plan.collectives:
        counts[block_of(c.module) or "(root)", c.when, c.kind, c.group, c.bytes] += 1
    for (where, when, kind, group, size), times in counts.items():
        table.add_row(where, when, kind, group, str(times), bytes_text(size))
    return table


def ranks_table(plan: Plan) -> Table:
    """The parameters that each rank holds, compared with the dense model."""
    table = _table("what each rank holds", "rank>", "parameters>", "bytes>", "of dense>")
    total = max(plan.bytes(), 1)
    table.add_row("dense", f"{plan.parameters():,}", bytes_text(plan.bytes()), "100%")
    for rank in range(plan.tp):
        size = plan.bytes(rank)
        table.add_row(str(rank), f"{plan.parameters(rank):,}", bytes_text(size), f"{100 * size / total:.1f}%")
    return table


def totals(plan: Plan) -> str:
    """One paragraph of totals."""
    sizes = {when: sum(c.bytes for c in plan.collectives if c.when == when) for when in ("forward", "backward")}
    unsplit = [w for w in plan.weights if not w.shards]
    counts = [
        f"{plan.count(when)} in a {when} ({bytes_text(sizes[when])}; at least {fewest}, {bytes_text(size)})"
        for when, (fewest, size) in plan.fewest.items()
    ]
    lines = [
        f"collectives: {', '.join(counts)}",
        f"split: {100 * plan.share_split:.1f}% of the elements of weights with two or more dims; "
        f"{len(unsplit)} weights of {sum(w.elements for w in unsplit):,} elements stay whole",
    ]
    if plan.obstacles:
        lines.append(obstacles_text(plan))
    if plan.graph_breaks:
        breaks = folded_breaks(plan.graph_breaks)
        lines += ["not captured as one graph; graph breaks:", *(f"  {graph_break}" for graph_break in breaks)]
    if plan.gathered:
        lines.append("all-gathered: " + ", ".join(plan.gathered))
    return "\n".join(lines)


def obstacles_text(plan: Plan) -> str:
    """The warning about weights that stay unsplit because they have too few pieces for the ranks.

    It gives each weight's share of the parameters, the reason with the line of the model's code, and the most ranks
    that the weight could be split over.
    """
    total, obstacles = max(plan.parameters(), 1), plan.obstacles
    share = sum(w.elements for w in obstacles) / total
    count = f"{len(obstacles)} weights" if len(obstacles) > 1 else "a weight"
    stay = "stay" if len(obstacles) > 1 else "stays"
    lines = [f"{plan.model}: {count}, {share:.1%} of the parameters, {stay} whole on each of {plan.tp} ranks:"]
    groups: dict[tuple, list[Weight]] = defaultdict(list)
    for w in obstacles:
        groups[block_of(w.name), folded_text(w.why), w.limit].append(w)
    for (name, _, limit), group in groups.items():
        names = f"{len(group)} x {name}" if len(group) > 1 else group[0].name
        share = sum(w.elements for w in group) / total
        advice = f"tp up to {limit} would split it" if limit > 1 else "no tp would split it"
        lines.append(f"  {names} ({share:.1%}): {group[0].why}; {advice}")
    limits = [w.limit for w in obstacles if w.limit and w.limit > 1]
    if limits:
        some = "all" if len(limits) == len(obstacles) else "more"
        lines.append(f"tp = 1 to {min(limits)} would split {some} of them.")
    return "\n".join(lines)


def plan_text(plan: Plan) -> str:
    """A plan as tables."""
    return render(weights_table(plan), "", collectives_table(plan), "", ranks_table(plan), "", totals(plan))
