"""What a run found, as a record for a file and as tables for people."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from rich.table import Table

from autotp.utils.tables import bytes_text
from benchmarks.cases import Case
from benchmarks.measure import Result, ratios, spread

Record = dict[str, Any]
"""What goes into the file."""

_WITHOUT = "autotp without "
_ALL = f"{_WITHOUT}none"


def table(*columns: str) -> Table:
    made = Table(pad_edge=False, box=None)
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if i else "left", no_wrap=True)
    return made


def recorded(case: Case, results: dict[str, Result]) -> Record:
    """A case's results, and what is reckoned from them."""
    reference = results.get(case.reference, Result())
    models: Record = {}
    for name, result in results.items():
        models[name] = found = asdict(result)
        if result.seconds:
            low, middle, high = spread(result.seconds)
            found |= {"median": middle, "quartiles": [low, high], "median_cpu": statistics.median(result.cpu)}
            if reference.seconds:
                low, middle, high = spread(ratios(result, reference))
                found |= {"ratio": middle, "ratio_quartiles": [low, high]}
                found["ratio_cpu"] = found["median_cpu"] / statistics.median(reference.cpu)
    return {"title": case.title, "reference": case.reference, "models": models}


def number(value: float) -> str:
    """Milliseconds in as many digits as mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(found: Record) -> str:
    """A ratio and its quartiles, or that there is none."""
    if found.get("failed"):
        return "failed"
    if "ratio" not in found:
        return ""
    low, high = found["ratio_quartiles"]
    return f"{found['ratio']:.2f} ({low:.2f}..{high:.2f})"


def show_case(name: str, record: Record) -> list[Any]:
    """A case's table, and what failed in it."""
    made = table(name, "median ms", "quartiles", f"to {record['reference']}", "CPU ms", "to it", "collectives", "bytes",
                 "error")  # fmt: skip
    for model, found in record["models"].items():
        if found["failed"]:
            made.add_row(model, "failed")
            continue
        low, high = (number(1e3 * s) for s in found["quartiles"])
        calls = " + ".join(f"{n:g} {kind}" for kind, n in sorted(found["calls"].items())) or "none"
        work, size = found.get("ratio_cpu"), bytes_text(sum(found["bytes"].values()))
        made.add_row(
            model, number(1e3 * found["median"]), f"{low}..{high}", ratio(found), number(1e3 * found["median_cpu"]),
            f"{work:.2f}" if work else "", calls, size, f"{found['error']:.0e}",
        )  # fmt: skip
    return ["", record["title"], made, *failures(record)]


def failures(record: Record) -> list[str]:
    return [f"{model} failed: {found['failed']}" for model, found in record["models"].items() if found["failed"]]


def show_final(cases: Record) -> list[Any]:
    """All cases in one table, and those at tp=1 in another."""
    parts: list[Any] = []
    for reference in ("hand-written", "dense"):
        rows = {name: record for name, record in cases.items() if record["reference"] == reference}
        if not rows:
            continue
        names = dict.fromkeys(m for record in rows.values() for m in record["models"] if m != reference)
        columns = [m for m in names if not m.startswith(_WITHOUT)]
        made = table(f"eager, to {reference}", *columns)
        work = table("the same in CPU time", *columns)
        for name, record in rows.items():
            found = [record["models"].get(m, {}) for m in columns]
            made.add_row(name, *map(ratio, found))
            work.add_row(name, *(f"{each['ratio_cpu']:.2f}" if "ratio_cpu" in each else "" for each in found))
        parts += ["", made, "", work]
    return parts


def show_passes(cases: Record) -> list[Any]:
    """How much longer autotp takes without each of the lowering passes."""
    rows = dict.fromkeys(m for record in cases.values() for m in record["models"] if m.startswith(_WITHOUT))
    rows.pop(_ALL, None)
    made = table("without this pass, to with all", *cases)
    work = table("the same in CPU time", *cases)
    for row in rows:
        texts, busy = [], []
        for record in cases.values():
            found, all_of_them = record["models"].get(row, {}), record["models"].get(_ALL, {})
            if not found.get("seconds") or not all_of_them.get("seconds"):
                texts.append("failed" if found.get("failed") else "")
                busy.append("")
                continue
            low, middle, high = spread([a / b for a, b in zip(found["seconds"], all_of_them["seconds"])])
            texts.append(f"{middle:.2f} ({low:.2f}..{high:.2f})")
            busy.append(f"{found['median_cpu'] / all_of_them['median_cpu']:.2f}")
        made.add_row(row.removeprefix(_WITHOUT), *texts)
        work.add_row(row.removeprefix(_WITHOUT), *busy)
    return ["", made, "", work]


def show_once(once: dict[str, float]) -> Table:
    made = table("once, before the first step", "s")
    for name, seconds in once.items():
        made.add_row(name, f"{seconds:.1f}")
    return made


def show_memory(memory: Record) -> list[Any]:
    """Peak memory of each model, each in processes of its own."""
    made = table("memory of a rank", "shard", "loading, peak", "to shard", "held after", "to shard", "of it file pages",
                 "step, peak", "to hand-written")  # fmt: skip
    hand = memory.get("hand-written", {}).get("step")
    for name, found in memory.items():
        if "failed" in found:
            made.add_row(name, "failed")
            continue
        shard = found["shard"]
        made.add_row(
            name, bytes_text(shard), bytes_text(found["load"]), f"{found['load'] / shard:.2f}",
            bytes_text(found["held"]), f"{found['held'] / shard:.2f}", bytes_text(found["files"]),
            bytes_text(found["step"]), f"{found['step'] / hand:.2f}" if hand else "",
        )  # fmt: skip
    lines = [f"{name} failed: {found['failed']}" for name, found in memory.items() if "failed" in found]
    return ["", "above a process with everything imported; the largest of the ranks; training steps", made, *lines]
