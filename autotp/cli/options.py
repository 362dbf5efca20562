"""options: the commands and options of the command line, and what is refused before anything is loaded."""

from __future__ import annotations

import argparse

from autotp.version import __version__

__all__ = ["BadModelError", "check_options", "parser"]


class BadModelError(ValueError):
    """An argument of the command line that cannot be used; the message is one line and says what could."""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="autotp", description="Tensor parallelism for any dense PyTorch transformer, from its dataflow alone."
    )
    parser.add_argument("--version", action="version", version=f"autotp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="show how a model would be split, without processes or weights")
    verify = commands.add_parser(
        "verify", help="compare the parallel model with the dense one, all ranks in one process"
    )
    check = commands.add_parser("check", help="prove that the ranks' graphs are the dense model's, without running any")
    for command in (inspect, check, verify):
        _add_model(command)
    printed = inspect.add_mutually_exclusive_group()
    printed.add_argument("--graph", action="store_true", help="print the rewritten graph of one rank")
    printed.add_argument("--dot", action="store_true", help="print the rewritten graph for Graphviz")
    printed.add_argument("--json", action="store_true", help="print the plan as JSON")
    inspect.add_argument("--rank", type=int, default=0, metavar="R", help="the rank whose graph is printed (0)")
    verify.add_argument(
        "--dtype",
        choices=("float64", "float32", "bfloat16", "float16", "model"),
        default="float64",
        help="the dtype to compare in (float64); model: the model's own",
    )
    verify.add_argument("--processes", action="store_true", help="run the ranks as real processes, not in this one")
    fuzz = commands.add_parser("fuzz", help="capture, shard, prove and compare random transformers")
    fuzz.add_argument("--n", type=int, default=200, metavar="N", help="the number of models (200)")
    fuzz.add_argument("--seed", type=int, default=0, metavar="S", help="the seed that models are drawn with (0)")
    fuzz.add_argument("--start", type=int, default=0, metavar="I", help="the number of the first model (0)")
    fuzz.add_argument(
        "--write", default="fuzz", metavar="DIR", help="the directory for a test file of each failure (fuzz)"
    )
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    """Add the options that name a model, its sizes and the number of ranks."""
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


def check_options(options: argparse.Namespace) -> None:
    """Raise a BadModelError if a number is out of its range."""
    if options.command == "fuzz":
        return
    if not 1 <= options.tp <= 62:
        raise BadModelError(f"--tp {options.tp}: the number of ranks is 1 or more, 62 at most")
    if options.batch < 1 or (options.sequence is not None and options.sequence < 1):
        raise BadModelError("--batch and --sequence are 1 or more")
    if options.command == "inspect" and not 0 <= options.rank < options.tp:
        raise BadModelError(f"--rank {options.rank}: with --tp {options.tp} there are ranks 0 to {options.tp - 1}")
