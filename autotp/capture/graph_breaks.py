"""graph_breaks: where capture ended, and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autotp.modules.names import block_of

__all__ = ["GraphBreak", "partition_text"]


@dataclass(frozen=True)
class GraphBreak:
    """Where capture ended.

    Attributes:
        module: the innermost module that could not be captured (``""``: the model).
        place: ``path:line`` of the code, where it is known.
        reason: why.
    """

    module: str
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.module or 'the model'}{f' ({self.place})' if self.place else ''}: {self.reason}"


def folded_breaks(seams: Sequence[GraphBreak]) -> list[GraphBreak]:
    """Seams, with those of repeated blocks as one."""
    found: dict[GraphBreak, list[GraphBreak]] = defaultdict(list)
    for seam in seams:
        found[replace(seam, module=block_of(seam.module))].append(seam)
    return [folded if len(each) > 1 else each[0] for folded, each in found.items()]


def partition_text(model: str, parts: Sequence[str], seams: Sequence[GraphBreak], outside: float) -> str:
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
    lines += [f"  {seam}" for seam in folded_breaks(seams)]
    lines.append(
        "The rest runs as the Python that it is, on whole values; "
        f"{100 * outside:.1f}% of the parameters stay whole because of this."
    )
    return "\n".join(lines)


def _counted(paths: Sequence[str]) -> list[str]:
    """Module paths, those of repeated blocks as one with their number."""
    return [f"{n} x {path}" if n > 1 else path for path, n in Counter(map(block_of, paths)).items()]
