"""The plan: what each weight becomes, what is communicated, and why. A value to print, save and feed back."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from autotp.admission import admit
from autotp.errors import PlanError, check_tp
from autotp.inputs import ExampleInputs, example_call
from autotp.parts import Division, Part, Seam, divide
from autotp.rewrite import Rewritten
from passes import IndexSet, Layout, Shards, ops
from passes.graphs import op_name
from passes.rules.contraction import MOVES

__all__ = ["Collective", "Plan", "Weight", "make_plan", "plan_of"]


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
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    style: str
    shards: Mapping[int, Shards]
    why: str

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
    """

    model: str
    tp: int
    weights: tuple[Weight, ...]
    collectives: tuple[Collective, ...]
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
                           "collectives": collectives, "gathered": list(self.gathered),
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
            weights.append(Weight(w["name"], shape, w["itemsize"], w["style"], shards, w["why"]))
        collectives = [Collective(**{k: v for k, v in c.items() if k != "bytes"}) for c in data["collectives"]]
        seams = tuple(Seam(**s) for s in data.get("seams", ()))
        return Plan(data["model"], data["tp"], tuple(weights), tuple(collectives), tuple(data["gathered"]), seams)

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


def _elements(value: Any) -> tuple[int, int]:
    """A (fake) tensor's number of elements at the example inputs' size, and its bytes an element."""
    if not isinstance(value, torch.Tensor):
        return 0, 0
    total = 1
    for size in value.shape:
        total *= size if isinstance(size, int) else int(size.node.hint or 1)
    return total, value.element_size()


def _collectives(graph: fx.Graph, tp: int) -> list[Collective]:
    found = []
    needed: dict[fx.Node, bool] = {}  # whether the captured call needs a gradient of a value
    for node in graph.nodes:
        if node.op == "placeholder":
            needed[node] = node.meta["global"].requires_grad
        elif node.op == "get_attr":
            needed[node] = bool(node.meta.get("grad"))
        else:
            needed[node] = bool(node.meta.get("grad")) and any(needed[n] for n in node.all_input_nodes)
        if node.op != "call_function":
            continue
        module = node.meta.get("module", "")
        if node.target in (ops.all_reduce, ops.all_gather, ops.settle):
            kind = "all_gather" if node.target is ops.all_gather else "all_reduce"
            found.append(Collective(kind, "forward", node.name, module, *_elements(node.meta["global"]), node.args[-1]))
        elif node.target is ops.vocab_parallel_cross_entropy:
            rows, itemsize = _elements(node.args[1].meta["global"])[0], node.args[0].meta["global"].element_size()
            found.append(Collective("all_gather", "forward", node.name, module, 3 * rows * tp, itemsize, node.args[-1]))
        elif node.target in (ops.enter, ops.enter_overlapping):
            entered = node.args[0] if isinstance(node.args[0], tuple) else (node.args[0],)
            if not any(needed[v] for v in entered):
                continue  # made of inputs that need no gradient: nothing to reduce
            sizes = []
            for value in entered:
                elements, itemsize = _elements(value.meta["global"])
                layout = value.meta.get("layout")
                if value.op == "get_attr" and layout is not None and node.target is ops.enter:
                    for _, s in layout.shards:
                        elements = elements // s.size * max(s.counts)
                sizes.append(elements)
            found.append(Collective("all_reduce", "backward", node.name, module, sum(sizes), itemsize, node.args[-1]))
    return found


_STYLES = {
    **dict.fromkeys(ops.ROW_PARALLEL.values(), "row"),
    **dict.fromkeys(ops.COLUMN_PARALLEL.values(), "column"),
    ops.vocab_parallel_embedding: "vocabulary",
}


def _style(node: fx.Node) -> str:
    """How a split weight is used: by the product, or look-up, that it reaches."""
    for user in node.users:
        if user.target in _STYLES:
            return _STYLES[user.target]
        follow = user.target in (ops.enter, ops.enter_overlapping, operator.getitem)
        if follow or op_name(user) in MOVES:
            found = _style(user)
            if found != "split":
                return found
    return "split"


def _why(weight: Layout, style: str, units: str) -> str:
    shared = [s for _, s in weight.shards if not s.disjoint]
    if style == "row":
        text = f"contracts {units}: a pending sum, reduced once"
    elif style == "vocabulary":
        text = "each rank looks up its own words, reduced once"
    elif style == "column":
        text = f"makes {units}"
    else:
        text = f"belongs to {units}"
    if shared:
        text += "; shared by ranks that need the same part, gradients summed among them"
    return text


_UNUSED = "not used in the captured call"


def _weights(rewritten: Rewritten, part: Part) -> Iterator[Weight]:
    """What a part's program makes of each of its weights, under the model's names."""
    nodes = {str(n.target): n for n in rewritten.graph.nodes if n.op == "get_attr"}
    parameters = dict(part.module.named_parameters())
    for name, full in part.names.items():
        shape, itemsize = tuple(part.programs.dense.shapes[name]), parameters[name].element_size()
        layout = rewritten.stored.get(name)
        if layout is None or layout.whole:
            why = rewritten.reasons.get(name) or (_UNUSED if name not in nodes else "as planned")
            yield Weight(full, shape, itemsize, "whole", {}, why)
            continue
        style = _style(nodes[name]) if name in nodes else "split"
        _, shards = layout.shards[0]
        counts = "/".join(str(c) for c in sorted(set(shards.counts), reverse=True))
        why = _why(layout, style, f"{counts} of {shards.size} indices")
        yield Weight(full, shape, itemsize, style, layout.dims, why)


def plan_of(division: Division, tp: int) -> Plan:
    """The plan that a model follows, whole or in parts: a part's collectives count once for each of its calls."""
    found: dict[str, Weight] = {}
    collectives, gathered = [], []
    for part in [*division.parts, *division.idle]:
        prefix = f"{part.path.replace('.', '_')}_" if part.path else ""
        for call in part.calls:
            rewritten, _ = part.programs.find(call.args, call.kwargs)
            for weight in _weights(rewritten, part):
                if found.get(weight.name, weight).why == _UNUSED or weight.name not in found:
                    found[weight.name] = weight
            if part in division.idle:
                continue
            for c in _collectives(rewritten.graph, tp):
                module = ".".join(x for x in (part.path, c.module) if x)
                collectives.append(replace(c, of=prefix + c.of, module=module))
            gathered += [f"{prefix}{node.name} for {op}" for node, op in rewritten.gathered]
    weights = [
        found.get(n) or Weight(n, tuple(p.shape), p.element_size(), "whole", {}, "in Python that is not captured")
        for n, p in division.model.named_parameters()
    ]
    return Plan(
        type(division.model).__name__,
        tp,
        tuple(weights),
        tuple(collectives),
        tuple(dict.fromkeys(gathered)),
        tuple(division.seams),
    )


def make_plan(model: nn.Module, tp: int, *, example_inputs: ExampleInputs = None) -> Plan:
    """The plan for splitting ``model`` over ``tp`` ranks; nothing is changed.

    No process group is needed and no weight is read: the model may be on the meta device.

    Args:
        model: the dense model.
        tp: the number of ranks.
        example_inputs: as for :func:`autotp.parallelize`.

    Example:
        >>> print(autotp.plan(model, tp=4))
    """
    check_tp(tp)
    admit(model)
    args, kwargs = example_call(model, example_inputs)
    division = divide(model, tp, args, kwargs)
    division.warn()
    return plan_of(division, tp)


def block_of(path: str) -> str:
    """A module path with numbers replaced, so that repeats of a block have one name: ``layers.*.mlp``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
