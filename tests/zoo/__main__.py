"""Run the zoo: ``python -m tests.zoo [--write] [--check] [--processes N] [--within SECONDS] [NAME ...]``.

Each architecture is one row (:mod:`tests.zoo.measure`); progress is printed as rows come in. ``--write``
records the rows and writes ``docs/coverage.md``; ``--check`` exits 1 if a row is worse than recorded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any


def _line(row: Any) -> str:
    if row.dense_error or row.capture_error:
        return f"{row.name}: {row.dense_error or row.capture_error}"[:200]
    each = [
        f"{tp}: {'ok' if at.ok else at.error} {at.share:.3f}{'' if at.vocabulary else ' (vocabulary whole)'} "
        f"{at.forward}+{at.backward} (min {at.minimum[0]}+{at.minimum[1]})"
        for tp, at in row.at.items()
    ]
    return f"{row.name} [{row.kind}] " + ", ".join(each)


def _measured(names: list[str], processes: int) -> Iterator[dict[str, Any]]:
    """The rows of architectures as they come in, each measured in a process of its own, which may die."""
    from tests.zoo.measure import LIMIT, Row, send_measured

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.zoo.warm"])
    waiting, running = list(reversed(names)), dict[Connection, tuple[str, Any, float]]()
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop()
            mine, its = context.Pipe(duplex=False)
            process = context.Process(target=send_measured, args=(name, its))
            process.start()
            its.close()
            running[mine] = name, process, time.monotonic()
        for connection in wait(list(running), timeout=10):
            assert isinstance(connection, Connection)
            name, process, _ = running.pop(connection)
            try:
                yield connection.recv()
            except EOFError:
                process.join()
                yield Row(name, "dense", capture_error=f"the process ended with {process.exitcode}").to_json()
            process.join()
        for _, process, start in running.values():
            if time.monotonic() - start > 1.5 * LIMIT:  # the alarm did not come through
                process.kill()


def main() -> int:
    """Run, print, record, compare."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="kind/type, or a part of it; all by default")
    parser.add_argument("--write", action="store_true", help="record the rows and write docs/coverage.md")
    parser.add_argument("--check", action="store_true", help="exit 1 if a row is worse than recorded")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--within", type=float, metavar="SECONDS", help="leave out what is recorded to take longer")
    args = parser.parse_args()

    from tests.zoo.architectures import architectures
    from tests.zoo.measure import Row
    from tests.zoo.table import ROWS, load, save, worse

    every = [str(a) for a in architectures()]
    names = [n for n in every if not args.names or any(n == x or (x not in every and x in n) for x in args.names)]
    recorded = load() if ROWS.exists() else {}
    if args.within is not None:
        names = [n for n in names if n not in recorded or recorded[n].seconds <= args.within]
    names.sort(key=lambda n: -recorded[n].seconds if n in recorded else 0.0)  # long ones first
    rows, failures, start = [], [], time.monotonic()
    for data in _measured(names, args.processes):
        row = Row.from_json(data)
        rows.append(row)
        print(f"[{len(rows)}/{len(names)}, {time.monotonic() - start:.0f} s] {_line(row)}", flush=True)
        if args.write and len(rows) % 10 == 0:
            save({**recorded, **{r.name: r for r in rows}}.values())
        if args.check and row.name in recorded:
            failures += worse(recorded[row.name], row)
    if args.write:
        save({**recorded, **{r.name: r for r in rows}}.values())
    for failure in failures:
        print(f"WORSE {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
