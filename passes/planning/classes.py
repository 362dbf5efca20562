"""classes: units that share a dim, and what splitting them gains."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from torch import fx

from passes.graphs import op_name, shape
from passes.layouts.facts import Facts
from passes.layouts.units import components, services_of
from passes.planning.cost import CostModel

__all__ = ["deal"]


def deal(count: int, ranks: int) -> list[int]:
    """``count`` things dealt to ranks as evenly as can be, the first ranks getting one more."""
    return [count // ranks + (r < count % ranks) for r in range(ranks)]


class Classes:
    """Units grouped into classes (units that share a dim) and families (units in the same places)."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.roots = facts.units.roots()
        self.users, self.sources = facts.units.services(self.roots)
        count = facts.units.count
        self.factors = [f for value in facts.values.values() for f in value.factors]
        rng = np.random.default_rng(0)
        self.signature = np.zeros(count, dtype=np.uint64)
        present = np.zeros(count, dtype=bool)
        heads, others = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        seen: set[bytes] = set()
        for labels in {id(f.labels): f.labels for f in self.factors}.values():
            units = self.roots[labels].reshape(-1)
            key = units.tobytes()
            if key in seen:  # values that move together say the same
                continue
            seen.add(key)
            present[units] = True
            np.add.at(self.signature, units, rng.integers(1, 2**63, dtype=np.uint64))
            if units.size and (units != units[0]).any():
                heads.append(np.broadcast_to(units[:1], units.size - 1))
                others.append(units[1:])
        self.of_unit = components(count, np.concatenate(heads), np.concatenate(others))
        self.served = np.zeros(count, dtype=bool)
        self.served[self.sources] = True
        self.present = np.flatnonzero(present)
        self.families: dict[int, list[np.ndarray]] = defaultdict(list)
        self.family_size = np.zeros(count, dtype=np.int64)
        free = self.present[~self.served[self.present]]
        kinds = self.signature[free] + self.of_unit[free].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        _, inverse = np.unique(kinds, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        for family in np.split(free[order], np.flatnonzero(np.diff(inverse[order])) + 1):
            if family.size:
                self.families[int(self.of_unit[family[0]])].append(np.sort(family))
                self.family_size[family] = family.size
        self._users_of = self._user_classes()
        self._behind: dict[int, set[int]] = {}

    def of(self, labels: np.ndarray) -> int:
        """The class of a factor's labels (one factor's units are all of one class)."""
        return int(self.of_unit[self.roots[labels.flat[0]]])

    def _user_classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Source units, ascending, and the class of a user of each, or of a user of a user that is itself a source."""
        count = self.facts.units.count
        pairs = np.unique(self.sources * count + self.of_unit[self.users])
        between = self.served[self.users]
        sources, users = self.sources[between], self.users[between]
        while True:
            place, of_users = services_of(pairs // count, users)
            more = np.union1d(pairs, sources[place] * count + pairs[of_users] % count)
            if more.size == pairs.size:
                return pairs // count, pairs % count
            pairs = more

    def behind(self, labels: np.ndarray) -> set[int]:
        """The classes that decide whether a factor's labels are split: their own, or their users'."""
        found = self._behind.get(id(labels))
        if found is None:
            sources, classes = self._users_of
            units = self.roots[labels].reshape(-1)
            users = classes[services_of(sources, np.unique(units[self.served[units]]))[1]]
            every = {int(self.of_unit[units[0]]), *np.unique(users).tolist()}
            found = self._behind[id(labels)] = {c for c in every if c in self.families}
        return found

    def splits(self, labels: np.ndarray, tp: int) -> bool:
        """Whether a factor has units enough for ``tp`` ranks, or serves others that may."""
        units = self.roots[labels].reshape(-1)
        return bool(self.served[units].any() or (self.family_size[units] >= tp).any())

    def groups(self, family: np.ndarray) -> np.ndarray:
        """For each unit of a family a number that units served by the same sources share, where those
        sources do not serve the whole family."""
        unit, service = services_of(self.users, family)
        _, source, serves = np.unique(self.sources[service], return_inverse=True, return_counts=True)
        some = serves[source] < family.size
        found = np.zeros(family.size, dtype=np.uint64)
        marks = np.random.default_rng(0).integers(1, 2**63, serves.size, dtype=np.uint64)
        np.add.at(found, unit[some], marks[source[some]])
        return found


def class_gains(graph: fx.Graph, facts: Facts, classes: Classes, tp: int, cost: CostModel) -> dict[int, float]:
    """What splitting each class gains, in the cost model's unit."""
    share = 1 - 1 / tp
    gains: dict[int, float] = defaultdict(float)

    for sizes, labels in facts.work.values():
        for c in {c for each in labels for c in classes.behind(each)}:
            gains[c] += 2 * cost.activation(sizes) * share
    for node, labels in facts.pending.items():
        for c in {classes.of(each) for each in labels}:
            gains[c] -= cost.per_collective + 2 * cost.per_element * cost.activation(shape(node))
    for node, labels in facts.exchanged.items():
        for c in {classes.of(each) for each in labels}:
            gains[c] -= 2 * (cost.per_collective + 2 * cost.per_element * cost.activation(shape(node)[:-1]))
    for node in {n for each in facts.wanted_whole.values() for n in each}:
        if node.meta.get("grad"):
            for c in {classes.of(f.labels) for f in facts.values[node].factors}:
                gains[c] -= cost.per_collective + cost.per_element * cost.activation(shape(node))
    for node, labels in facts.picked.items():
        for c in {classes.of(each) for each in labels}:
            gains[c] -= cost.per_collective + cost.per_element * cost.activation(shape(node.args[0]))
    tables = {n.args[0] for n in graph.nodes if op_name(n) == "aten.embedding"}
    for node in graph.nodes:
        if node.op == "get_attr" and node.meta.get("grad") and node in facts.values:
            factors = facts.values[node].factors
            if node in tables:  # memory is no reason to split a table's columns where its rows can be split
                factors = tuple(f for f in factors if 0 in f.dims and classes.splits(f.labels, tp)) or factors
            for factor in factors:
                for c in classes.behind(factor.labels):
                    gains[c] += cost.per_parameter * cost.elements(shape(node)) * share
    return gains
