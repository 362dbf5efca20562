"""The command line: ``autotp inspect``, ``check`` and ``verify``, each of ``MODEL --tp N``, and ``autotp fuzz``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from autotp.capture.example_inputs import example_call
from autotp.cli.model_loader import BadModelError, Loaded, load
from autotp.cli.reduced_config import smaller_configs
from autotp.errors import AutoTPError, CaptureError, PartialCaptureWarning, WholeWeightWarning
from autotp.partition.partition import Partition, partition_model
from autotp.plans.make_plan import plan_of
from autotp.plans.plan import collectives_table, ranks_table, totals, weights_table
from autotp.program.graph_text import graph_dot
from autotp.verification.report import report_text
from autotp.verification.verify import verify, with_labels

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autotp", description="Tensor parallelism for any dense PyTorch transformer, from its dataflow alone."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="show how a model would be split, without processes or weights")
    verify_ = commands.add_parser(
        "verify", help="compare the parallel model with the dense one, all ranks in one process"
    )
    check = commands.add_parser("check", help="prove that the ranks' graphs are the dense model's, without running any")
    for command in (inspect, check, verify_):
        command.add_argument(
            "model",
            metavar="MODEL",
            help="a directory with a transformers config.json, a transformers model type (llama), or "
            "package.module:factory returning a module or (module, example_inputs)",
        )
        command.add_argument("--tp", type=int, required=True, metavar="N", help="the number of ranks")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            dest="settings",
            metavar="FIELD=VALUE",
            help="override a field of a transformers config (repeatable)",
        )
        command.add_argument("--batch", type=int, default=2, metavar="B", help="batch size of the example inputs (2)")
        command.add_argument("--sequence", type=int, metavar="S", help="their sequence length (128; verify: 16)")
    shown = inspect.add_mutually_exclusive_group()
    shown.add_argument("--graph", action="store_true", help="print the rewritten graph of one rank")
    shown.add_argument("--dot", action="store_true", help="print the rewritten graph for Graphviz")
    shown.add_argument("--json", action="store_true", help="print the plan as JSON")
    inspect.add_argument("--rank", type=int, default=0, metavar="R", help="whose graph to print (0)")
    verify_.add_argument(
        "--dtype",
        choices=("float64", "float32", "bfloat16", "float16", "model"),
        default="float64",
        help="compare in (float64); model: in its own",
    )
    verify_.add_argument(
        "--processes", action="store_true", help="on real processes instead of in lockstep in this one"
    )
    fuzz = commands.add_parser("fuzz", help="capture, shard, prove and compare random transformers")
    fuzz.add_argument("--n", type=int, default=200, metavar="N", help="how many (200)")
    fuzz.add_argument("--seed", type=int, default=0, metavar="S", help="which (0)")
    fuzz.add_argument("--start", type=int, default=0, metavar="I", help="the number of the first (0)")
    fuzz.add_argument(
        "--write", default="fuzz", metavar="DIR", help="where a test file goes for each that fails (fuzz)"
    )
    return parser


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """A spinner on a terminal's standard error; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def _division(loaded: Loaded, tp: int, name: str, settings: Sequence[str], size: tuple[int, int]) -> Partition:
    """The model in parts; with weights, made at random if need be, where it must run once to find those."""
    args, kwargs = example_call(loaded.model, loaded.example_inputs)
    try:
        return partition_model(loaded.model, tp, args, kwargs)
    except CaptureError as error:
        need = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        if not any(p.is_meta for p in loaded.model.parameters()) or 2 * need > _memory():
            raise
        print(f"autotp: {error.reason}: running it once, with weights, to find its parts", file=sys.stderr)
    loaded = load(name, settings, weights=True, size=size)
    return partition_model(loaded.model, tp, *example_call(loaded.model, loaded.example_inputs))


def _inspect(options: argparse.Namespace) -> int:
    if not 0 <= options.rank < options.tp:
        raise BadModelError(f"--rank {options.rank}: with --tp {options.tp} there are ranks 0 to {options.tp - 1}")
    size = (options.batch, options.sequence or 128)
    with _progress("building the model"):
        loaded = load(options.model, options.settings, weights=False, size=size)
    with _progress("capturing and planning"):
        division = _division(loaded, options.tp, options.model, options.settings, size)
        plan = plan_of(division, options.tp)
    programs = [p.cache for p in division.parts]
    graphs = [p.graph(p.last, options.rank) for p in programs if p.last is not None]
    if options.json:
        print(plan.to_json())
    elif options.graph:
        titles = [f"# part {p.path}\n" if p.path else "" for p in division.parts]
        print("\n\n".join(f"{title}{graph}" for title, graph in zip(titles, graphs, strict=True)))
    elif options.dot:
        print("\n".join(graph_dot(g.graph, p.path or plan.model) for p, g in zip(division.parts, graphs, strict=True)))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 140)
        for part in (weights_table(plan), collectives_table(plan), ranks_table(plan)):
            console.print(part)
            console.print()
        console.print(totals(plan), highlight=False, markup=False)
    return 0


def _check(options: argparse.Namespace) -> int:
    size = (options.batch, options.sequence or 128)
    with _progress("building the model"):
        loaded = load(options.model, options.settings, weights=False, size=size)
    with _progress("capturing and rewriting"):
        division = _division(loaded, options.tp, options.model, options.settings, size)
    proved = True
    for part in division.parts:
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
    """Whether this machine can hold what a verification of a model needs."""
    copies = 5 if ranks == 1 else 4 + 3 * ranks  # the copy, its shards, and both sets of gradients
    need = sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters()) * copies
    return need <= _memory()


def _fitting(options: argparse.Namespace, dtype: torch.dtype | None, size: tuple[int, int]) -> tuple[Loaded, str]:
    """The model, with weights, or the largest form of it that this machine can hold, and what of it is less."""
    ranks = options.tp if options.processes else 1
    whole = load(options.model, options.settings, weights=False, size=size)
    if _fits(whole.model, dtype, ranks):
        return load(options.model, options.settings, weights=True, size=size), ""
    count = sum(p.numel() for p in whole.model.parameters())
    config = getattr(whole.model, "config", None)
    for smaller in smaller_configs(config) if hasattr(config, "to_dict") else ():
        settings = [*options.settings, *smaller]
        try:
            fits = _fits(load(options.model, settings, weights=False, size=size).model, dtype, ranks)
        except BadModelError:  # sizes that do not go together in this architecture
            continue
        if fits:
            said = f"with {' '.join(smaller)} and random weights, as the whole ({count:,} parameters) does not fit here"
            return load(options.model, settings, weights=True, size=size), said
    raise BadModelError(
        f"verifying {count:,} parameters takes more than the {_memory() / 1e9:.0f} GB that this machine has: verify a "
        "smaller form of it, e.g. --set num_hidden_layers=2"
    )


def _verify(options: argparse.Namespace) -> int:
    dtype = None if options.dtype == "model" else getattr(torch, options.dtype)
    size = (options.batch, options.sequence or 16)
    with _progress("building the model"):
        loaded, reduced = _fitting(options, dtype, size)
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
    from rich.console import Console

    from autotp.fuzz.search import Drawn, fuzz

    console, start, drawn = Console(soft_wrap=True, highlight=False, markup=False), time.monotonic(), list[Drawn]()

    def progress(model: Drawn) -> None:
        drawn.append(model)
        if model.failure is not None:
            console.print(f"model {model.number} at tp {model.tp}: {model.failure.kind}; shrinking {model.recipe}")
        elif len(drawn) % 50 == 0:
            console.print(f"{len(drawn)} models in {time.monotonic() - start:.0f} s")

    found = fuzz(options.n, options.seed, start=options.start, directory=Path(options.write), progress=progress)
    for each in found:
        console.print(f"model {each.number}: {each.recipe} at tp {each.tp}: {each.failure}")
    wrong = f"{len(found)} fail, written to {options.write}/" if found else "none fails"
    split, several = sum(d.split > 0 for d in drawn), sum(d.tp > 1 for d in drawn)
    console.print(
        f"{options.n} random models of seed {options.seed}, {several} of them for several ranks, {split} with split "
        f"weights: {wrong}"
    )
    return 1 if found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0 fine, 1 not equal or not proved, 2 bad input."""
    options = _parser().parse_args(arguments)
    gc.set_threshold(100_000)  # of what one command makes most stays: looking for garbage took a tenth of its time
    try:
        if options.command == "fuzz":
            return _fuzz(options)
        if not 1 <= options.tp <= 62:
            raise BadModelError(f"--tp {options.tp}: the number of ranks is 1 or more, 62 at most")
        if options.batch < 1 or (options.sequence is not None and options.sequence < 1):
            raise BadModelError("--batch and --sequence are 1 or more")
        return {"inspect": _inspect, "check": _check, "verify": _verify}[options.command](options)
    except (BadModelError, AutoTPError) as error:
        print(f"autotp: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, a pager say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
