"""alignment: match operands' dims by letter, as an einsum does."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from passes.layouts.axes import Axes, Dim, Size, common_refinement
from passes.layouts.units import Factor, Units, Value

__all__ = ["Alignment", "Key", "Keyed", "align", "combine"]

Key = tuple[str, int]
"""A factor that operands of an op share: the letter of its dim and its position within that dim."""


@dataclass(frozen=True)
class Alignment:
    """The correspondence between the virtual dims of an op's operands and result.

    Attributes:
        operands: per operand its axes, refined until factors match one to one, and the key of each virtual dim.
        out: the same for the result.
        sizes: each key's size.
    """

    operands: tuple[tuple[Axes, tuple[Key, ...]], ...]
    out: tuple[Axes, tuple[Key, ...]]
    sizes: dict[Key, Size]


def align(
    values: Sequence[Value], letters: Sequence[Sequence[str]], out_letters: Sequence[str], units: Units
) -> tuple[Alignment, list[Value]] | None:
    """Match operands' dims by letter, as an einsum does, down to common factors.

    Args:
        values: the operands.
        letters: per operand, the letter of each of its dims. A dim of size one broadcasts.
        out_letters: the letter of each of the result's dims.
        units: the units in which labels are united, if factors of a dim have to be merged to match.

    Returns:
        The alignment and the operands with their axes refined to it; None where some letter's
        factors cut across each other.
    """
    values = list(values)
    factors: dict[str, Dim] = {}
    for letter in dict.fromkeys(x for names in letters for x in names):
        uses = [(i, d) for i, names in enumerate(letters) for d, x in enumerate(names) if x == letter]
        uses = [(i, d) for i, d in uses if values[i].axes[d]]
        if not uses:
            factors[letter] = ()
            continue
        refinement: Dim | None = values[uses[0][0]].axes[uses[0][1]]
        for i, d in uses[1:]:
            refinement = common_refinement(refinement, values[i].axes[d]) if refinement is not None else None
        if refinement is None:
            dims = [values[i].axes[d] for i, d in uses]
            static = {dim for dim in dims if all(s.static for s in dim)}
            if all(len(dim) == 1 for dim in dims) and len(static) <= 1:
                refinement = next(iter(static), dims[0])  # one size at run time, in several expressions
                for i, d in uses:
                    axes = values[i].axes
                    values[i] = Value(axes[:d] + (refinement,) + axes[d + 1 :], values[i].factors)
            else:
                for i, d in uses:
                    merged = values[i].merged(d, units)
                    if merged is None:
                        return None
                    values[i] = merged
                merged_dims = {values[i].axes[d] for i, d in uses}
                if len(merged_dims) != 1:
                    return None
                refinement = merged_dims.pop()
        factors[letter] = refinement

    def keyed(names: Sequence[str], axes: Axes) -> tuple[Axes, tuple[Key, ...]]:
        """Axes, and the key of each of their virtual dims."""
        return axes, tuple((x, k) for x, dim in zip(names, axes, strict=True) for k in range(len(dim)))

    operands, refined = [], []
    for value, names in zip(values, letters, strict=True):
        axes = tuple(factors[x] if dim else () for x, dim in zip(names, value.axes, strict=True))
        operands.append(keyed(names, axes))
        refined.append(value.refined(axes))
    out = keyed(out_letters, tuple(factors.get(x, ()) for x in out_letters))
    sizes = {(x, k): s for x, dim in factors.items() for k, s in enumerate(dim)}
    return Alignment(tuple(operands), out, sizes), refined


Keyed = list[tuple[tuple[Key, ...], np.ndarray]]
"""Factors over keys instead of virtual dims: the keys of each factor, and its labels."""


def keyed_factors(alignment: Alignment, operands: Sequence[Value]) -> list[Keyed]:
    """Each operand's factors over keys, the keys of each factor in sorted order."""
    by_operand = []
    for (_, keys), value in zip(alignment.operands, operands, strict=True):
        factors: Keyed = []
        for factor in value.factors:
            names = [keys[d] for d in factor.dims]
            order = sorted(range(len(names)), key=names.__getitem__)
            factors.append((tuple(names[i] for i in order), factor.labels.transpose(order)))
        by_operand.append(factors)
    return by_operand


def _spread(labels: np.ndarray, keys: tuple[Key, ...], all_keys: tuple[Key, ...]) -> np.ndarray:
    """Labels over all keys, with an axis of size one for each key that they do not vary on."""
    return labels.reshape([labels.shape[keys.index(k)] if k in keys else 1 for k in all_keys])


def _unite_except(labels: np.ndarray, keys: tuple[Key, ...], shared: Sequence[Key], units: Units) -> np.ndarray:
    """Unite labels along all keys except the shared ones; returns one label for each index of those."""
    heads = labels[tuple(slice(None) if k in shared else slice(0, 1) for k in keys)]
    units.unite(labels, heads)
    return heads.reshape([n for n, k in zip(labels.shape, keys, strict=True) if k in shared])


def combine(factors: Keyed, units: Units, across: Collection[Key] = ()) -> Keyed:
    """The factors of an op's result from those of its operands.

    Factors over the same keys are united index by index. A factor over fewer keys serves the factor over more.

    Args:
        factors: all operands' factors.
        units: the units in which labels are united.
        across: a factor that lacks only these keys is united with the wider one instead of serving it. Of several
            such factors that share no key only the first (outermost) is, or all would be one unit.
    """
    combined: Keyed = []
    united: list[set[Key]] = []  # per combined factor, the keys of narrower factors that have been united with it
    for keys, labels in sorted(factors, key=lambda f: (-len(f[0]), f[0])):
        overlapping = [i for i, (other, _) in enumerate(combined) if set(other) & set(keys)]
        if not overlapping:
            combined.append((keys, labels))
            united.append(set())
        elif len(overlapping) == 1 and set(keys) <= set(combined[overlapping[0]][0]):
            wide_keys, wide = combined[overlapping[0]]
            united_keys = united[overlapping[0]]
            missing = set(wide_keys) - set(keys)
            if missing <= set(across) and (not missing or not united_keys or united_keys & set(keys)):
                units.unite(wide, _spread(labels, keys, wide_keys))
                united_keys |= set(keys) if missing else set()
            else:
                units.serve(wide, _spread(labels, keys, wide_keys))
        else:  # each has keys that the other lacks: labels differ along shared keys only, if a single factor overlaps
            shared = [k for k in keys if len(overlapping) == 1 and k in combined[overlapping[0]][0]]
            narrow = _unite_except(labels, keys, shared, units)
            for i in overlapping:
                units.unite(_unite_except(combined[i][1], combined[i][0], shared, units), narrow)
    return combined


def as_value(alignment: Alignment, factors: Keyed) -> Value:
    """The labelled result from factors over keys; factors over keys that the result lacks are left out."""
    axes, keys = alignment.out
    virtual = {key: v for v, key in enumerate(keys)}
    out = []
    for names, labels in factors:
        if all(k in virtual for k in names):
            dims = [virtual[k] for k in names]
            order = sorted(range(len(dims)), key=dims.__getitem__)
            out.append(Factor(tuple(dims[i] for i in order), labels.transpose(order)))
    return Value(axes, tuple(out))
