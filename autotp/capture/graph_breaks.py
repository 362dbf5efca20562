"""graph_breaks: the modules at which capture ended, and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autotp.modules.names import block_of

__all__ = ["GraphBreak", "partition_text"]


@dataclass(frozen=True)
class GraphBreak:
    """A module at which capture ended.

    Attributes:
        module: the innermost module that could not be captured (``""``: the model).
        place: ``path:line`` of the code that cannot be captured, if known.
        reason: why.
    """

    module: str
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.module or 'the model'}{f' ({self.place})' if self.place else ''}: {self.reason}"


def folded_breaks(graph_breaks: Sequence[GraphBreak]) -> list[GraphBreak]:
    """Graph breaks, with one for those that are the same in each repeated block."""
    groups: dict[GraphBreak, list[GraphBreak]] = defaultdict(list)
    for graph_break in graph_breaks:
        groups[replace(graph_break, module=block_of(graph_break.module))].append(graph_break)
    return [folded if len(group) > 1 else group[0] for folded, group in groups.items()]


def partition_text(model: str, parts: Sequence[str], graph_breaks: Sequence[GraphBreak], share_outside: float) -> str:
    """The text that tells a user how a model with graph breaks was captured.

    Args:
        model: the model's class.
        parts: the paths of the captured modules.
        graph_breaks: the modules at which capture ended.
        share_outside: the fraction of the parameters that stay unsplit because of the graph breaks.
    """
    summary = (
        f"but in {len(parts)} parts: {', '.join(_counted(parts))}" if parts else "and no part of it is worth splitting"
    )
    lines = [f"{model} cannot be captured as one graph, {summary}."]
    lines += [f"  {graph_break}" for graph_break in folded_breaks(graph_breaks)]
    lines.append(
        "The rest runs as its own Python, on replicated values; "
        f"{100 * share_outside:.1f}% of the parameters stay unsplit because of this."
    )
    return "\n".join(lines)


def _counted(paths: Sequence[str]) -> list[str]:
    """Module paths, with one path and a count for repeated blocks."""
    return [f"{n} x {path}" if n > 1 else path for path, n in Counter(map(block_of, paths)).items()]
