"""Plans and verification reports as text, for terminals and logs."""

from __future__ import annotations

import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from autotp.parts import Seam
from autotp.plan import Plan, Weight, block_of, folded_text

if TYPE_CHECKING:
    from autotp.verify import Report

__all__ = ["bytes_text", "collectives_table", "division_text", "obstacles_text", "plan_text", "ranks_table", "render",
           "report_text", "totals", "weights_table"]  # fmt: skip


def bytes_text(count: float) -> str:
    """A number of bytes for people: ``13.5 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def render(*parts: Table | str, width: int = 140) -> str:
    """Tables and lines as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, color_system=None)
    for part in parts:
        console.print(part, highlight=False, markup=False) if isinstance(part, str) else console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


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
        lines += ["not captured as one graph; seams at", *(f"  {seam}" for seam in _folded_seams(plan.seams))]
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


def _folded_seams(seams: Sequence[Seam]) -> list[Seam]:
    """Seams, with those of repeated blocks as one."""
    found: dict[Seam, list[Seam]] = defaultdict(list)
    for seam in seams:
        found[replace(seam, module=block_of(seam.module))].append(seam)
    return [folded if len(each) > 1 else each[0] for folded, each in found.items()]


def division_text(model: str, parts: Sequence[str], seams: Sequence[Seam], outside: float) -> str:
    """What a user is told of a model that could not be captured whole.

    Args:
        model: its class.
        parts: the paths of its parts.
        seams: where capture ended.
        outside: the share of its parameters that stays whole because of this.
    """
    found = (
        f"but in {len(parts)} parts: {', '.join(_counted(parts))}" if parts else "and no part of it is worth splitting"
    )
    lines = [f"{model} cannot be captured as one graph, {found}."]
    lines += [f"  {seam}" for seam in _folded_seams(seams)]
    lines.append(
        "The rest runs as the Python that it is, on whole values; "
        f"{100 * outside:.1f}% of the parameters stay whole because of this."
    )
    return "\n".join(lines)


def _counted(paths: Sequence[str]) -> list[str]:
    """Module paths, those of repeated blocks as one with their number."""
    return [f"{n} x {path}" if n > 1 else path for path, n in Counter(map(block_of, paths)).items()]


def plan_text(plan: Plan) -> str:
    """A plan as tables."""
    return render(weights_table(plan), "", collectives_table(plan), "", ranks_table(plan), "", totals(plan))


def report_text(report: Report, mark: Callable[[bool], str] = lambda ok: "ok" if ok else "WRONG") -> str:
    """A verification report as text; the largest errors, and every one that is too large."""
    limit = report.tolerance
    name, error = report.worst_gradient
    worst = report.worst_output
    lines = [
        f"{report.model} on {report.tp} ranks against dense, {str(report.dtype).removeprefix('torch.')}, "
        f"relative errors must stay under {limit:g}",
        f"  outputs    {worst:.1e}  {mark(worst < limit)}  ({len(report.outputs)} compared)",
    ]
    if report.loss is not None:
        lines.append(f"  loss       {report.loss[0]:.12g} dense, {report.loss[1]:.12g} parallel")
    lines.append(
        f"  gradients  {error:.1e}  {mark(error < limit)}  ({len(report.gradients)} compared"
        + (f", largest for {name})" if name else ")")
    )
    dense, parallel = report.norm
    lines.append(f"  norm       {dense:.12g} dense, {parallel:.12g} parallel, of all gradients")
    agree = report.divergence == 0.0
    how = (
        "equal to the bit"
        if agree
        else (
            f"differ by {report.divergence:.1e} from {report.diverging} on"
            if math.isfinite(report.divergence)
            else f"differ from {report.diverging} on"
        )
    )
    lines.append(f"  ranks      {how}  {mark(agree)}")
    for kind, errors in (("output", report.outputs), ("gradient", report.gradients)):
        lines += [f"    {kind} {n}: {e:.1e}" for n, e in errors.items() if not e < limit]
    lines += [f"    only on one side: {n}" for n in report.missing]
    if report.seams:
        lines += ["not captured as one graph; seams at", *(f"  {seam}" for seam in _folded_seams(report.seams))]
    lines.append("verdict: " + ("the parallel model equals the dense one" if report.ok else "NOT EQUAL"))
    return "\n".join(lines)
