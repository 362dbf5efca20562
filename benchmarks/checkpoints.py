"""Reading and saving a checkpoint by autotp, by transformers and by torch, beside ``cp`` of the same bytes, in one run.

Start it with::

    python benchmarks/checkpoints.py

It makes a Llama of random weights (``--gigabytes``), saves it densely, and starts two groups of gloo processes of one
thread each. The first, at ``--tp``, reads and saves:

- ``cp`` of the dense folder, by one process while the ranks wait: the reference of every other row;
- ``autotp weights=, whole``: ``parallelize(empty model, weights=folder)``; and ``reading``, the part of it whose time
  depends on the bytes: opening, matching, comparing first elements, ``read_shards``. The rest is capture, plan and
  proof, which take as long for any width;
- ``autotp.save``;
- transformers' ``from_pretrained`` under its own tensor parallelism, which maps the files and leaves some weights there
  until they are used: once as it is, once with a look at every page of them; and ``save_pretrained`` of that model,
  which gathers;
- ``dcp.save`` of ``model.state_dict()`` with ``torch.distributed.checkpoint``, and the same with torch's
  ``HuggingFaceStorageWriter`` and its consolidation, which writes safetensors files like ``autotp.save`` does; that one
  saves transformers' model, as autotp refuses writers of safetensors files that do not know of its shards.

The second group, at ``--to``, reads what the first has saved: ``dcp.load`` into a model's state dict, which cuts the
weights anew, and autotp's reading of the dense files beside it.

Each row is checked first, in a round that is not timed: loaded tensors equal the dense ones, ``autotp.save`` writes
the dense files to the byte, other files have the dense tensors. Then all take turns, round by round: read the ratios
to ``cp``, which are medians of the rounds' ratios, and the quartiles beside them. A round's time is the slowest
rank's. ``CPU s`` is the processor time of all ranks (of ``cp``: its own), which other work on the machine changes
less.

Files are in the page cache when they are read, and are not flushed after they are written; what a row has written is
removed before the next one. In a folder on tmpfs, such as /dev/shm, no disk has a part in it. On a disk the kernel
writes pages back while a row still runs, more of them the longer it takes, and each row begins after a ``sync``.

``read`` is what a rank gets by system calls (the largest of the ranks), which leaves out mapped files. ``peak`` is the
resident memory of a rank above what it held before, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[0] = ROOT
WORDS = 32000


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of weights, about; default 2")
    for name, default in (("rounds", 7), ("tp", 2), ("to", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--folder", help="where to make a temporary folder; by default where the system makes them")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument("--group", choices=("first", "second"), help=argparse.SUPPRESS)  # one of the processes
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    return parser


def sizes(gigabytes: float) -> list[int]:
    """Hidden, layers, heads, key-value heads, ffn, words of a Llama of so many bytes in float32."""

    def of(hidden: int) -> float:
        layer = 3 * hidden**2 + 3 * hidden * (hidden * 11 // 4)
        return (gigabytes * 1e9 / 4 - 2 * WORDS * hidden) / layer

    hidden = next((h for h in (4096, 2048, 1024) if of(h) > 4), 512)
    heads = hidden // 64
    return [hidden, max(1, round(of(hidden))), heads, heads // 2, hidden * 11 // 4, WORDS]


def file_system(folder: Path) -> str:
    said = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], check=True, capture_output=True, text=True)
    return said.stdout.strip()


def show(title: str, group: dict[str, Any]) -> list[Any]:
    """A group's tables."""
    from autotp.utils.tables import bytes_text
    from benchmarks.checkpoint_rows import READ, SAVE
    from benchmarks.report import failures, ratio, table

    parts: list[Any] = []
    for kind in (READ, SAVE):
        rows = {n: r for n, r in group["rows"].items() if r["kind"] in ("", kind)}
        if len(rows) < 2:
            continue
        made = table(f"{kind} {title}", "median s", "quartiles", "to cp", "CPU s", "to it",
                     "read" if kind == READ else "written", "peak of a rank")  # fmt: skip
        for name, row in rows.items():
            if row["failed"]:
                made.add_row(name, "failed")
                continue
            low, high = row["quartiles"]
            mine = bool(row["kind"])  # cp is a process of its own
            amount = row["written"] if kind == SAVE else row["read"] if mine else 0
            made.add_row(
                name, f"{row['median']:.2f}", f"{low:.2f}..{high:.2f}", ratio(row), f"{row['cpu_median']:.2f}",
                f"{row['cpu_ratio']:.2f}", bytes_text(amount) if amount else "",
                bytes_text(row["peak"]) if mine else "",
            )  # fmt: skip
        parts += ["", made, *failures({"models": rows})]
    return [*parts, "load average {:.1f} before, {:.1f} at the end".format(*group["load"])]


def be_rank(options: argparse.Namespace) -> None:
    """One of the processes; rank 0 writes what was found."""
    import torch
    import torch.distributed as dist
    import transformers

    from benchmarks.checkpoint_rows import Group

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = Group(options.within, options.rounds, file_system(options.within) != "tmpfs")
    found = group.run(group.first() if options.group == "first" else group.second())
    if options.group == "first":
        group.keep()
    if group.rank == 0:
        (options.within / f"{options.group}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Start the processes, or be one of them. The exit code: 1 if a row failed or is wrong."""
    options = arguments().parse_args()
    if options.group:
        be_rank(options)
        return 0
    import torch

    from autotp.utils.tables import bytes_text, render
    from benchmarks import memory
    from benchmarks.checkpoint_rows import size_of

    shape = sizes(options.gigabytes)
    env = {**os.environ, **memory.QUIET}
    record: dict[str, Any] = {"options": vars(options), "sizes": shape, "torch": torch.__version__}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        within = Path(name)
        make = [sys.executable, memory.__file__, str(within / "dense"), "--sizes", *map(str, shape), "--save"]
        subprocess.run(make, env=env, check=True)
        record |= {"bytes": size_of(within / "dense"), "file system": file_system(within)}
        print(
            f"gloo ranks of one thread, {os.cpu_count()} CPUs, torch {torch.__version__}; a Llama of hidden "
            f"{shape[0]}, {shape[1]} layers, float32: {bytes_text(record['bytes'])}, on {record['file system']}",
            flush=True,
        )
        for group, ranks in (("first", options.tp), ("second", options.to)):
            line = memory.torchrun(ranks, os.path.abspath(__file__), *sys.argv[1:])
            subprocess.run([*line, "--group", group, "--within", name], env=env, check=True)
            record[group] = json.loads((within / f"{group}.json").read_text())
            title = f"at tp={ranks}" + (f" what tp={options.tp} saved" if group == "second" else "")
            print(render(*show(title, record[group]), width=180), flush=True)
    if options.json:
        del record["options"]["group"], record["options"]["within"]
        Path(options.json).write_text(json.dumps(record, indent=1))
    return int(any(row["failed"] for group in ("first", "second") for row in record[group]["rows"].values()))


if __name__ == "__main__":
    sys.exit(main())
