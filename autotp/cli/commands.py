"""commands: ``autotp inspect``, ``check``, ``verify`` and ``fuzz``. Imports torch: imported when a command runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from autotp.capture.example_inputs import example_call
from autotp.cli.model_loader import Loaded, load
from autotp.cli.options import BadModelError
from autotp.cli.reduced_config import smaller_configs
from autotp.errors import CaptureError, PartialCaptureWarning, WholeWeightWarning
from autotp.partition.partition import Partition, partition_model
from autotp.plans.make_plan import plan_of
from autotp.plans.plan import collectives_table, ranks_table, totals, weights_table
from autotp.program.graph_text import graph_dot
from autotp.verification.report import report_text
from autotp.verification.verify import verify, with_labels

__all__ = ["COMMANDS"]


@contextlib.contextmanager
def _progress(message: str) -> Iterator[None]:
    """Show a spinner on a terminal's standard error; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


def _size(options: argparse.Namespace, sequence: int) -> tuple[int, int]:
    """Batch and sequence length of the example inputs."""
    return options.batch, options.sequence or sequence


def _partition(options: argparse.Namespace, step: str) -> Partition:
    """The model that the options name, captured as its largest capturable modules.

    Some models must run once for that. Then the model is loaded again with weights, random ones if it has none.
    """
    size = _size(options, 128)
    with _progress("building the model"):
        loaded = load(options.model, options.settings, weights=False, size=size)
    with _progress(step):
        args, kwargs = example_call(loaded.model, loaded.example_inputs)
        try:
            return partition_model(loaded.model, options.tp, args, kwargs)
        except CaptureError as error:
            need = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
            if not any(p.is_meta for p in loaded.model.parameters()) or 2 * need > _memory():
                raise
            print(f"autotp: {error.reason}: running it once, with weights, to find its parts", file=sys.stderr)
        loaded = load(options.model, options.settings, weights=True, size=size)
        return partition_model(loaded.model, options.tp, *example_call(loaded.model, loaded.example_inputs))


def _inspect(options: argparse.Namespace) -> int:
    """Print the plan of a model, or the rewritten graph of one rank."""
    partition = _partition(options, "capturing the model")
    with _progress("planning"):
        plan = plan_of(partition, options.tp)
    caches = [p.cache for p in partition.parts]
    graphs = [c.graph(c.last, options.rank) for c in caches if c.last is not None]
    if options.json:
        print(plan.to_json())
    elif options.graph:
        titles = [f"# part {p.path}\n" if p.path else "" for p in partition.parts]
        print("\n\n".join(f"{title}{graph}" for title, graph in zip(titles, graphs, strict=True)))
    elif options.dot:
        named = zip([p.path or plan.model for p in partition.parts], graphs, strict=True)
        print("\n".join(graph_dot(graph.graph, name) for name, graph in named))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 140)
        for table in (weights_table(plan), collectives_table(plan), ranks_table(plan)):
            console.print(table)
            console.print()
        console.print(totals(plan), highlight=False, markup=False)
    return 0


def _check(options: argparse.Namespace) -> int:
    """Print the proof's verdict on each captured module; 1 if one is not proved."""
    partition = _partition(options, "capturing and rewriting")
    proved = True
    for part in partition.parts:
        program = part.cache.last
        if program is not None:
            print(f"{part.path}: {program.verdict}" if part.path else program.verdict)
            proved = proved and program.verdict.proved
    return 0 if proved else 1


def _memory() -> int:
    """Bytes of memory that this machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 1 << 62


def _fits(model: nn.Module, dtype: torch.dtype | None, ranks: int) -> bool:
    """Whether the verification of a model fits in this machine's memory."""
    copies = 5 if ranks == 1 else 4 + 3 * ranks  # the copy, its shards, and both sets of gradients
    need = sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters()) * copies
    return need <= _memory()


def _load_fitting(options: argparse.Namespace, dtype: torch.dtype | None, size: tuple[int, int]) -> tuple[Loaded, str]:
    """The model, or the largest reduced config that fits in memory, with weights; and a note on what was reduced."""
    ranks = options.tp if options.processes else 1
    full = load(options.model, options.settings, weights=False, size=size)
    if _fits(full.model, dtype, ranks):
        return load(options.model, options.settings, weights=True, size=size), ""
    count = sum(p.numel() for p in full.model.parameters())
    config = getattr(full.model, "config", None)
    for smaller in smaller_configs(config) if hasattr(config, "to_dict") else ():
        settings = [*options.settings, *smaller]
        try:
            fits = _fits(load(options.model, settings, weights=False, size=size).model, dtype, ranks)
        except BadModelError:  # sizes that do not go together in this architecture
            continue
        if fits:
            note = f"with {' '.join(smaller)} and random weights, as the whole ({count:,} parameters) does not fit here"
            return load(options.model, settings, weights=True, size=size), note
    raise BadModelError(
        f"verifying {count:,} parameters takes more than the {_memory() / 1e9:.0f} GB that this machine has: verify a "
        "smaller form of it, e.g. --set num_hidden_layers=2"
    )


def _verify(options: argparse.Namespace) -> int:
    """Print the comparison of a model with its parallel form; 1 if they differ."""
    dtype = None if options.dtype == "model" else getattr(torch, options.dtype)
    with _progress("building the model"):
        loaded, reduced = _load_fitting(options, dtype, _size(options, 16))
    with _progress("comparing with the dense model"), warnings.catch_warnings():
        warnings.simplefilter("ignore", PartialCaptureWarning)  # the report says it
        warnings.simplefilter("ignore", WholeWeightWarning)
        inputs = loaded.example_inputs
        if isinstance(inputs, dict):
            inputs = with_labels(loaded.model, (), inputs)
        report = verify(loaded.model, options.tp, example_inputs=inputs, dtype=dtype, processes=options.processes)
    if reduced:
        print(f"verified at a reduced size: {reduced}")
    print(report_text(report))
    return 0 if report.ok else 1


def _fuzz(options: argparse.Namespace) -> int:
    """Print the random models that fail, as they are found and when they are shrunk; 1 if there are any."""
    from rich.console import Console

    from autotp.fuzz.search import Drawn, fuzz

    console, start, drawn = Console(soft_wrap=True, highlight=False, markup=False), time.monotonic(), list[Drawn]()

    def progress(model: Drawn) -> None:
        drawn.append(model)
        if model.failure is not None:
            console.print(f"model {model.number} at tp {model.tp}: {model.failure.kind}; shrinking {model.recipe}")
        elif len(drawn) % 50 == 0:
            console.print(f"{len(drawn)} models in {time.monotonic() - start:.0f} s")

    failures = fuzz(options.n, options.seed, start=options.start, directory=Path(options.write), progress=progress)
    for failure in failures:
        console.print(f"model {failure.number}: {failure.recipe} at tp {failure.tp}: {failure.failure}")
    result = f"{len(failures)} fail, written to {options.write}/" if failures else "none fails"
    split, several = sum(d.split > 0 for d in drawn), sum(d.tp > 1 for d in drawn)
    console.print(
        f"{options.n} random models of seed {options.seed}, {several} of them for several ranks, {split} with split "
        f"weights: {result}"
    )
    return 1 if failures else 0


COMMANDS = {"inspect": _inspect, "check": _check, "verify": _verify, "fuzz": _fuzz}
"""The function of each command; it takes the options and returns the exit code."""
