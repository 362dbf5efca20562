"""report: the comparison of a dense model with its parallel form, as a value and as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from autotp.capture.graph_breaks import GraphBreak, folded_breaks
from autotp.utils.renamed import renamed
from autotp.verification.measure import Measured, relative_error

__all__ = ["Report", "judge", "report_text"]


def report_text(report: Report, mark: Callable[[bool], str] = lambda ok: "ok" if ok else "WRONG") -> str:
    """A report as text: the largest errors, and all that are above the tolerance."""
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
    agreement = (
        "equal to the bit"
        if agree
        else (
            f"differ by {report.divergence:.1e} from {report.diverging} on"
            if math.isfinite(report.divergence)
            else f"differ from {report.diverging} on"
        )
    )
    lines.append(f"  ranks      {agreement}  {mark(agree)}")
    for kind, errors in (("output", report.outputs), ("gradient", report.gradients)):
        lines += [f"    {kind} {n}: {e:.1e}" for n, e in errors.items() if not e < limit]
    lines += [f"    only on one side: {n}" for n in report.missing]
    if report.graph_breaks:
        breaks = folded_breaks(report.graph_breaks)
        lines += ["not captured as one graph; graph breaks:", *(f"  {graph_break}" for graph_break in breaks)]
    lines.append("verdict: " + ("the parallel model equals the dense one" if report.ok else "NOT EQUAL"))
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The comparison of a dense model with its parallel form.

    Attributes:
        model: the model's class.
        tp: the number of ranks.
        outputs: the relative error of each output.
        gradients: the relative error of the gradient of each parameter, by name, and of each input that
            requires one (``input 0``, in flattened order).
        loss: the dense and the parallel loss, if the model computes one.
        norm: the norm of all parameters' gradients, dense and parallel.
        divergence: the largest difference between ranks in a replicated value; 0 if all have the same bits.
        diverging: the name of the first value in which ranks differ.
        tolerance: the bound that errors must stay under.
        dtype: the dtype compared in.
        missing: outputs and gradients of only one of the two.
        graph_breaks: the places where capture ended, of a model captured in parts.
    """

    model: str
    tp: int
    outputs: dict[str, float]
    gradients: dict[str, float]
    loss: tuple[float, float] | None
    norm: tuple[float, float]
    divergence: float
    diverging: str
    tolerance: float
    dtype: torch.dtype
    missing: tuple[str, ...] = field(default=())
    graph_breaks: tuple[GraphBreak, ...] = field(default=())

    seams = renamed("seams", "graph_breaks")

    @property
    def worst_output(self) -> float:
        """The largest relative error of an output."""
        return max(self.outputs.values(), default=0.0)

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The gradient with the largest relative error."""
        return max(self.gradients.items(), key=lambda item: item[1], default=("", 0.0))

    @property
    def ok(self) -> bool:
        """Whether outputs and gradients are equal within the tolerance, and the ranks' replicated values to the bit."""
        within = self.worst_output < self.tolerance and self.worst_gradient[1] < self.tolerance
        finite = all(map(math.isfinite, self.norm))
        within = within and (not finite or abs(self.norm[0] - self.norm[1]) <= self.tolerance * self.norm[0])
        return within and self.divergence == 0.0 and not self.missing

    def __str__(self) -> str:
        return report_text(self)


def judge(
    model: nn.Module, tp: int, dense: Measured, parallel: Measured, tolerance: float, divergence: float,
    diverging: str, graph_breaks: Sequence[GraphBreak],
) -> Report:  # fmt: skip
    """The report on two runs.

    The error of a gradient is relative to its own magnitude, or to a thousandth of the largest gradient's if that is
    larger: some gradients, such as a key bias's, are zero except for rounding.
    """
    largest = max((float(g.abs().max()) for g in dense.gradients.values()), default=0.0)
    floor, absent = 1e-3 * largest, torch.empty(0)
    losses = [m.outputs.get("loss") for m in (dense, parallel)]
    return Report(
        model=type(model).__name__,
        tp=tp,
        outputs={n: relative_error(v, parallel.outputs.get(n, absent)) for n, v in dense.outputs.items()},
        gradients={n: relative_error(g, parallel.gradients.get(n, absent), floor) for n, g in dense.gradients.items()},
        loss=None if losses[0] is None or losses[1] is None else (float(losses[0]), float(losses[1])),
        norm=(dense.norm, parallel.norm),
        divergence=divergence,
        diverging=diverging,
        tolerance=tolerance,
        dtype=next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
        missing=tuple(
            sorted(
                (dense.outputs.keys() ^ parallel.outputs.keys()) | (dense.gradients.keys() ^ parallel.gradients.keys())
            )
        ),
        graph_breaks=tuple(graph_breaks),
    )
