"""The coverage table: rows as JSON and as Markdown, and what has got worse."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from autotp.modules.names import folded_text
from tests.zoo.measure import TPS, Row

ROWS = Path(__file__).with_name("rows.json")
TABLE = Path(__file__).parents[2] / "docs" / "coverage.md"


def load() -> dict[str, Row]:
    """The recorded rows, by name."""
    return {data["name"]: Row.from_json(data) for data in json.loads(ROWS.read_text())}


def save(rows: Iterable[Row]) -> None:
    """Record rows, and write the table."""
    rows = sorted(rows, key=lambda row: row.name)
    plain = [{**row.to_json(), "seconds": round(row.seconds, 1)} for row in rows]
    ROWS.write_text(_without_folders("[\n" + ",\n".join(json.dumps(row) for row in plain) + "\n]\n"))
    rows = sorted(load().values(), key=lambda row: row.name)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text(rows))


def _without_folders(text: str) -> str:
    """A text with the files in it named without the folders that they lie in on this machine."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def worse(was: Row, now: Row) -> list[str]:
    """In what a row has got worse."""
    found = []
    if now.dense_error and not was.dense_error:
        found.append(f"the dense model no longer runs: {now.dense_error}")
    if now.capture_error and not was.capture_error:
        found.append(f"it is no longer captured: {now.capture_error}")
    for tp, before in was.at.items():
        after = now.at.get(tp)
        if after is None:
            continue
        if before.ok and not after.ok:
            found.append(f"tp {tp}: {after.error}")
        elif after.ok:
            if after.unproved and not before.unproved:
                found.append(f"tp {tp}: {after.unproved}")
            if after.share < before.share - 1e-3:
                found.append(f"tp {tp}: {after.share:.1%} of the matrices are split, it was {before.share:.1%}")
            if before.vocabulary and not after.vocabulary:
                found.append(f"tp {tp}: embedding or head are no longer split over the vocabulary")
            if (after.forward, after.backward) > (before.forward, before.backward):
                found.append(
                    f"tp {tp}: {after.forward} and {after.backward} collectives, it was {before.forward} and "
                    f"{before.backward}"
                )
    return [f"{now.name}: {each}" for each in found]


def _cells(row: Row) -> list[str]:
    if row.dense_error:
        return [row.name, row.kind, "", "", "", "", f"dense: {row.dense_error}"]
    if row.capture_error:
        return [row.name, row.kind, "", "", "", "", f"capture: {row.capture_error}"]
    passed = [tp for tp, at in row.at.items() if at.ok]
    shares = sorted({f"{at.share:.1%}" for at in row.at.values() if at.ok})
    counts = list(dict.fromkeys("{:g} + {:g}".format(*at.per_layer) for at in row.at.values() if at.ok))
    said = list(dict.fromkeys(folded_text(f"in parts: {seam}") for seam in row.seams))[:2]
    said += list(
        dict.fromkeys(folded_text(x) for at in row.at.values() for x in ([at.error] if at.error else at.whole))
    )
    said += [f"tp {tp}: {at.unproved}" for tp, at in row.at.items() if at.unproved]
    if at_tps := ", ".join(str(tp) for tp, at in row.at.items() if at.ok and not at.vocabulary):
        said.append(f"a table is whole or split over its columns instead of the vocabulary at tp {at_tps}")
    said += [
        f"tp {tp}: {at.forward} + {at.backward} collectives, {at.minimum[0]} + {at.minimum[1]} needed"
        for tp, at in row.at.items()
        if at.ok and (at.forward > at.minimum[0] or at.backward > at.minimum[1])
    ]
    more = f"; and {len(said) - 4} more" if len(said) > 4 else ""
    return [
        row.name,
        row.kind,
        ", ".join(passed) or "none",
        ", ".join(tp for tp, at in row.at.items() if at.ok and not at.unproved) or "none",
        ", ".join(shares),
        ", ".join(counts),
        "; ".join(said[:4]) + more,
    ]


def text(rows: list[Row]) -> str:
    """The table as Markdown, with what it comes to on top."""
    run = [row for row in rows if not row.dense_error]
    dense = [row for row in run if row.kind == "dense"]
    right = [row for row in run if len(row.at) == len(TPS) and all(at.ok for at in row.at.values())]
    proved = [row for row in right if not any(at.unproved for at in row.at.values())]
    full = [row for row in dense if len(row.at) == len(TPS) and all(at.full for at in row.at.values())]
    kinds = Counter(row.kind for row in rows)
    lines = [
        "# Coverage",
        "",
        "Every text architecture in transformers' own mappings, small (2 layers or one of each kind, 8 query and 2",
        "key-value heads where it takes them, MLP widths and vocabularies that do not divide), float64, all weights",
        "random: outputs, loss and every gradient against the dense model, whole values bit-equal across ranks, at",
        f"tp = {', '.join(map(str, TPS))}, relative error under 1e-9. Written by `python -m tests.zoo --write`.",
        "",
        f"- {len(rows)} architectures: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()) + ".",
        f"- {len(right)} of the {len(run)} that run at all are right at every tp.",
        f"- {len(proved)} of those are proved at every tp (`autotp check`).",
        f"- {len(full)} of {len(dense)} dense ones are all that is asked: 99% of their layers' matrices split,",
        "  embedding and head over the vocabulary, and no more collectives than the layouts make necessary.",
        "",
        "*Split* is the share of the elements of the layers' matrices that are split, key-value replicas aside;",
        "*a layer* is collectives forward + backward.",
        "",
        "| architecture | class | right at tp | proved at tp | split | a layer | what stays whole, and why |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"
