"""The final table as a bar plot: ratios to the hand-written model, in an SVG file written by hand.

    python benchmarks/plot.py results.json plot.svg

``results.json`` is what ``bench.py --json`` wrote. Bars start at 1, the hand-written model's time; those that
go down are faster. The scale is logarithmic; lines on the bars are the quartiles of the rounds.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from html import escape
from typing import Any

COLORS = {
    "dense": "#8c8c8c",
    "autotp": "#2f7fc1",
    "autotp compiled": "#8cc4ec",
    "autotp gloo": "#8a6fb5",
    "DTensor": "#d9772b",
    "transformers TP": "#6a9e3b",
}
BAR, GAP, HEIGHT, LEFT, TOP, BOTTOM = 26, 34, 300, 52, 56, 40


def text(x: float, y: float, content: str, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def ticks(low: float, high: float) -> Iterator[float]:
    """1, 2 and 5 times powers of ten."""
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        yield from (t for t in (m * 10.0**power for m in (1, 2, 5)) if low <= t <= high)


def svg(cases: dict[str, Any]) -> str:
    """The plot.

    Args:
        cases: of the record that ``bench.py`` writes.
    """
    rows = {n: c["models"] for n, c in cases.items() if c["reference"] == "hand-written"}
    names = [n for n in COLORS if any("ratio" in models.get(n, {}) for models in rows.values())]
    values = [q for models in rows.values() for n in names if "ratio" in models.get(n, {})
              for q in (models[n]["ratio"], *models[n]["ratio_quartiles"])]  # fmt: skip
    low, high = 0.9 * min([*values, 0.8]), 1.25 * max([*values, 1.25])
    width = LEFT + len(rows) * (len(names) * BAR + GAP) + GAP
    width = max(width, LEFT + sum(30 + 8 * len(n) for n in names))

    def y(ratio: float) -> float:
        return TOP + HEIGHT * (math.log(high) - math.log(ratio)) / (math.log(high) - math.log(low))

    parts = [text(LEFT, 18, "time to that of the model written by hand (1 = the same, lower is faster)", "start", 13)]
    x = float(LEFT)
    for name in names:
        parts.append(f'<rect x="{x:.1f}" y="28" width="12" height="12" fill="{COLORS[name]}"/>')
        parts.append(text(x + 17, 38, name, "start"))
        x += 30 + 8 * len(name)
    for tick in ticks(low, high):
        parts.append(line(LEFT, y(tick), width, y(tick), 'stroke="#dddddd"'))
        parts.append(text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end", 11))
    x = float(LEFT + GAP)
    for case, models in rows.items():
        parts.append(text(x + len(names) * BAR / 2, TOP + HEIGHT + 24, case))
        for name in names:
            found = models.get(name, {})
            if "ratio" in found:
                top, bottom = sorted((y(found["ratio"]), y(1)))
                parts.append(f'<rect x="{x + 1:.1f}" y="{top:.1f}" width="{BAR - 2}" height="{bottom - top:.1f}" '
                             f'fill="{COLORS[name]}"/>')  # fmt: skip
                lower, upper = found["ratio_quartiles"]
                parts.append(line(x + BAR / 2, y(lower), x + BAR / 2, y(upper), 'stroke="#222222"'))
                at = y(max(1, upper)) - 4
                parts.append(text(x + BAR / 2, at, f"{found['ratio']:.{1 if found['ratio'] >= 10 else 2}f}", size=10))
            elif found.get("failed"):
                parts.append(text(x + BAR / 2, y(1) - 4, "failed", size=8))
            x += BAR
        x += GAP
    parts.append(line(LEFT, y(1), width, y(1), 'stroke="#222222"'))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{TOP + HEIGHT + BOTTOM}" '
        f'font-family="sans-serif" fill="#222222">\n<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1]) as file:
        cases = json.load(file)["cases"]
    with open(sys.argv[2], "w") as file:
        file.write(svg(cases))


if __name__ == "__main__":
    main()
