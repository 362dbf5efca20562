"""alignment: match operands' dims by letter, as an einsum does."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from passes.layouts.axes import Axes, Dim, Size, common_refinement
from passes.layouts.units import Factor, Units, Value

__all__ = ["Alignment", "Key", "Keyed", "align", "combine"]

Key = tuple[str, int]
"""A factor that operands of an op share: the letter of its dim and its place within that dim."""


@dataclass(frozen=True)
class Alignment:
    """How the virtual dims of an op's operands and result correspond.

    ``operands[i]`` and ``out`` give axes, refined so far that factors match one to one, and the key
    of each virtual dim. ``sizes`` gives each key's size.
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
        units: where labels are united if factors of a dim have to be merged to match.

    Returns:
        The alignment and the operands with their axes refined to it; None where some letter's
        factors cut across each other.
    """
    values = list(values)
    factors: dict[str, Dim] = {}
    for letter in dict.fromkeys(x for each in letters for x in each):
        uses = [(i, d) for i, each in enumerate(letters) for d, x in enumerate(each) if x == letter]
        uses = [(i, d) for i, d in uses if values[i].axes[d]]
        if not uses:
            factors[letter] = ()
            continue
        found: Dim | None = values[uses[0][0]].axes[uses[0][1]]
        for i, d in uses[1:]:
            found = common_refinement(found, values[i].axes[d]) if found is not None else None
        if found is None:
            dims = [values[i].axes[d] for i, d in uses]
            known = {dim for dim in dims if all(s.static for s in dim)}
            if all(len(dim) == 1 for dim in dims) and len(known) <= 1:
                found = next(iter(known), dims[0])  # equal at run time, in other words: an expression each
                for i, d in uses:
                    axes = values[i].axes
                    values[i] = Value(axes[:d] + (found,) + axes[d + 1 :], values[i].factors)
            else:
                for i, d in uses:
                    merged = values[i].merged(d, units)
                    if merged is None:
                        return None
                    values[i] = merged
                alike = {values[i].axes[d] for i, d in uses}
                if len(alike) != 1:
                    return None
                found = alike.pop()
        factors[letter] = found

    def keyed(each: Sequence[str], axes: Axes) -> tuple[Axes, tuple[Key, ...]]:
        return axes, tuple((x, k) for x, dim in zip(each, axes, strict=True) for k in range(len(dim)))

    operands, refined = [], []
    for value, each in zip(values, letters, strict=True):
        axes = tuple(factors[x] if own else () for x, own in zip(each, value.axes, strict=True))
        operands.append(keyed(each, axes))
        refined.append(value.refined(axes))
    out = keyed(out_letters, tuple(factors.get(x, ()) for x in out_letters))
    sizes = {(x, k): s for x, dim in factors.items() for k, s in enumerate(dim)}
    return Alignment(tuple(operands), out, sizes), refined


Keyed = list[tuple[tuple[Key, ...], np.ndarray]]


def keyed_factors(alignment: Alignment, operands: Sequence[Value]) -> list[Keyed]:
    """Each operand's factors over keys instead of virtual dims, keys in sorted order."""
    found = []
    for (_, keys), value in zip(alignment.operands, operands, strict=True):
        each: Keyed = []
        for factor in value.factors:
            names = [keys[d] for d in factor.dims]
            order = sorted(range(len(names)), key=names.__getitem__)
            each.append((tuple(names[i] for i in order), factor.labels.transpose(order)))
        found.append(each)
    return found


def _spread(labels: np.ndarray, keys: tuple[Key, ...], over: tuple[Key, ...]) -> np.ndarray:
    """Insert axes of size one for the keys that labels do not vary on."""
    return labels.reshape([labels.shape[keys.index(k)] if k in keys else 1 for k in over])


def _united_but(labels: np.ndarray, keys: tuple[Key, ...], shared: Sequence[Key], units: Units) -> np.ndarray:
    """Unite labels along all but the shared keys; one for each index of those."""
    heads = labels[tuple(slice(None) if k in shared else slice(0, 1) for k in keys)]
    units.unite(labels, heads)
    return heads.reshape([n for n, k in zip(labels.shape, keys, strict=True) if k in shared])


def combine(factors: Keyed, units: Units, across: Collection[Key] = ()) -> Keyed:
    """Reconcile operands' factors: the same keys, the same units; fewer keys, a source that serves.

    Args:
        factors: all operands' factors.
        units: where labels are united.
        across: a factor that lacks none but these keys is united with the one over more instead of serving
            it. Of several that share no key only the first (outermost) is, or all would be one unit.
    """
    kept: Keyed = []
    tied: list[set[Key]] = []
    """For each factor kept, the keys of a factor nested in it that has been united with it."""
    for keys, labels in sorted(factors, key=lambda f: (-len(f[0]), f[0])):
        over = [i for i, (other, _) in enumerate(kept) if set(other) & set(keys)]
        if not over:
            kept.append((keys, labels))
            tied.append(set())
        elif len(over) == 1 and set(keys) <= set(kept[over[0]][0]):
            wide_keys, wide = kept[over[0]]
            bound = tied[over[0]]
            lacks = set(wide_keys) - set(keys)
            if lacks <= set(across) and (not lacks or not bound or bound & set(keys)):
                units.unite(wide, _spread(labels, keys, wide_keys))
                bound |= set(keys) if lacks else set()
            else:
                units.serve(wide, _spread(labels, keys, wide_keys))
        else:  # each has keys that the other lacks: what they share stays apart, if it is one that it shares it with
            shared = [k for k in keys if len(over) == 1 and k in kept[over[0]][0]]
            narrow = _united_but(labels, keys, shared, units)
            for i in over:
                units.unite(_united_but(kept[i][1], kept[i][0], shared, units), narrow)
    return kept


def as_value(alignment: Alignment, factors: Keyed) -> Value:
    """The result's value from factors over keys (those on keys the result lacks are left out)."""
    axes, keys = alignment.out
    place = {key: v for v, key in enumerate(keys)}
    found = []
    for names, labels in factors:
        if all(k in place for k in names):
            dims = [place[k] for k in names]
            order = sorted(range(len(dims)), key=dims.__getitem__)
            found.append(Factor(tuple(dims[i] for i in order), labels.transpose(order)))
    return Value(axes, tuple(found))
