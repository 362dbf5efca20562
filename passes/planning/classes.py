"""classes: the units that share a dim, and the gain of splitting them among ranks.

A unit is a set of indices that must stay together, such as one head (:mod:`passes.layouts.units`). A *class* is the
set of all units that share some dim: the heads of one layer, the neurons of one MLP, the words of the vocabulary. A
*family* is the set of those units of a class that occur in the same dims of the same values and serve no others. A
plan splits a class by dealing out the units of its families to the ranks.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from torch import fx

from passes.graphs import op_name, shape
from passes.layouts.facts import Facts
from passes.layouts.units import components, services_of
from passes.planning.cost import CostModel

__all__ = ["Classes", "class_gains", "deal"]


def deal(count: int, ranks: int) -> list[int]:
    """How many of ``count`` things each rank gets: as evenly as possible, the first ranks get one more."""
    return [count // ranks + (r < count % ranks) for r in range(ranks)]


class Classes:
    """Units grouped into classes and families.

    Attributes:
        roots: per label its unit.
        users: with ``sources``, the pairs of units in which the source serves the user; users ascending.
        sources: see ``users``.
        of_unit: per unit its class.
        is_source: per unit, whether it serves others.
        families: the families of each class, as ascending arrays of units.
        family_size: per unit the size of its family; 0 for sources.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.roots = facts.units.roots()
        self.users, self.sources = facts.units.services(self.roots)
        count = facts.units.count
        factors = [f for value in facts.values.values() for f in value.factors]
        rng = np.random.default_rng(0)
        signatures = np.zeros(count, dtype=np.uint64)  # equal for units in the same dims: a sum of the dims' hashes
        present = np.zeros(count, dtype=bool)
        heads, others = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        seen: set[bytes] = set()
        for labels in {id(f.labels): f.labels for f in factors}.values():
            units = self.roots[labels].reshape(-1)
            key = units.tobytes()
            if key in seen:  # values that move together say the same
                continue
            seen.add(key)
            present[units] = True
            np.add.at(signatures, units, rng.integers(1, 2**63, dtype=np.uint64))
            if units.size and (units != units[0]).any():
                heads.append(np.broadcast_to(units[:1], units.size - 1))
                others.append(units[1:])
        self.of_unit = components(count, np.concatenate(heads), np.concatenate(others))
        self.is_source = np.zeros(count, dtype=bool)
        self.is_source[self.sources] = True
        self.families: dict[int, list[np.ndarray]] = defaultdict(list)
        self.family_size = np.zeros(count, dtype=np.int64)
        free = np.flatnonzero(present & ~self.is_source)
        kinds = signatures[free] + self.of_unit[free].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        _, inverse = np.unique(kinds, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        for family in np.split(free[order], np.flatnonzero(np.diff(inverse[order])) + 1):
            if family.size:
                self.families[int(self.of_unit[family[0]])].append(np.sort(family))
                self.family_size[family] = family.size
        self._user_classes = self._classes_served()
        self._deciding: dict[int, set[int]] = {}

    def of(self, labels: np.ndarray) -> int:
        """The class of a factor's labels, whose units are all of one class."""
        return int(self.of_unit[self.roots[labels.flat[0]]])

    def _classes_served(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct pairs of a source unit and a class that it serves, as two arrays; sources ascending.

        A source serves the classes of its users, and those that its users serve in turn.
        """
        count = self.facts.units.count
        pairs = np.unique(self.sources * count + self.of_unit[self.users])
        chained = self.is_source[self.users]
        sources, users = self.sources[chained], self.users[chained]
        while True:
            service, pair = services_of(pairs // count, users)
            more = np.union1d(pairs, sources[service] * count + pairs[pair] % count)
            if more.size == pairs.size:
                return pairs // count, pairs % count
            pairs = more

    def deciding(self, labels: np.ndarray) -> set[int]:
        """The classes that decide whether a factor's labels are split: their own class, and the classes they serve."""
        classes = self._deciding.get(id(labels))
        if classes is None:
            sources, served = self._user_classes
            units = self.roots[labels].reshape(-1)
            users = served[services_of(sources, np.unique(units[self.is_source[units]]))[1]]
            every = {int(self.of_unit[units[0]]), *np.unique(users).tolist()}
            classes = self._deciding[id(labels)] = {c for c in every if c in self.families}
        return classes

    def splits(self, labels: np.ndarray, tp: int) -> bool:
        """Whether a factor has enough units for ``tp`` ranks, or serves units that may be split."""
        units = self.roots[labels].reshape(-1)
        return bool(self.is_source[units].any() or (self.family_size[units] >= tp).any())

    def groups(self, family: np.ndarray) -> np.ndarray:
        """For each unit of a family the number of its group.

        A group is the units that the same sources serve; a source that serves the entire family does not count.
        """
        unit, service = services_of(self.users, family)
        _, source, serves = np.unique(self.sources[service], return_inverse=True, return_counts=True)
        some = serves[source] < family.size
        groups = np.zeros(family.size, dtype=np.uint64)
        marks = np.random.default_rng(0).integers(1, 2**63, serves.size, dtype=np.uint64)
        np.add.at(groups, unit[some], marks[source[some]])
        return groups


def class_gains(graph: fx.Graph, facts: Facts, classes: Classes, tp: int, cost: CostModel) -> dict[int, float]:
    """The gain of splitting each class, in the cost model's unit."""
    saved = 1 - 1 / tp  # of what one rank alone would compute and hold
    gains: dict[int, float] = defaultdict(float)

    for sizes, work in facts.work.values():
        for c in {c for labels in work for c in classes.deciding(labels)}:
            gains[c] += 2 * cost.activation(sizes) * saved
    for node, summed in facts.pending.items():
        for c in {classes.of(labels) for labels in summed}:
            gains[c] -= cost.per_collective + 2 * cost.per_element * cost.activation(shape(node))
    for node, exchanged in facts.exchanged.items():
        for c in {classes.of(labels) for labels in exchanged}:
            gains[c] -= 2 * (cost.per_collective + 2 * cost.per_element * cost.activation(shape(node)[:-1]))
    for node in {n for operands in facts.wanted_whole.values() for n in operands}:
        if node.meta.get("grad"):
            for c in {classes.of(f.labels) for f in facts.values[node].factors}:
                gains[c] -= cost.per_collective + cost.per_element * cost.activation(shape(node))
    for node, picked in facts.picked.items():
        for c in {classes.of(labels) for labels in picked}:
            gains[c] -= cost.per_collective + cost.per_element * cost.activation(shape(node.args[0]))
    tables = {n.args[0] for n in graph.nodes if op_name(n) == "aten.embedding"}
    for node in graph.nodes:
        if node.op == "get_attr" and node.meta.get("grad") and node in facts.values:
            factors = facts.values[node].factors
            if node in tables:  # memory is no reason to split a table's columns where its rows can be split
                factors = tuple(f for f in factors if 0 in f.dims and classes.splits(f.labels, tp)) or factors
            for factor in factors:
                for c in classes.deciding(factor.labels):
                    gains[c] += cost.per_parameter * cost.elements(shape(node)) * saved
    return gains
