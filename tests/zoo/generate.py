"""generate of every dense decoder and encoder-decoder, against the dense model's on real processes.

``python -m tests.zoo.generate [--tp 2] [--ways greedy,static,beam] [NAME ...]`` prints a row of a table for each:
``equal``, ``different``, what autotp's error is, or why the dense model itself does not do it. Float64, 8 tokens,
every rank with a seed of its own. Exits 1 if a row has tokens that differ, or an error of autotp's.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers

import autotp
from autotp.verification.measure import Float64
from autotp.verification.processes import free_port, join_as_rank
from tests.zoo.architectures import Architecture, architectures
from tests.zoo.table import load

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beam": {"num_beams": 2},
}
TOKENS = 8


def dense_names() -> list[str]:
    """The decoders and encoder-decoders that docs/coverage.md calls dense."""
    rows = load()
    return [str(a) for a in architectures() if a.kind in ("causal", "seq2seq") and rows[str(a)].kind == "dense"]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _tokens(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
    given = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    start = {"decoder_start_token_id": 2} if model.config.is_encoder_decoder else {}
    found = model.generate(
        **given, **start, **options, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert isinstance(found, torch.Tensor)
    return found


def compare(architecture: Architecture, tp: int, ways: list[str]) -> dict[str, str]:
    """One architecture: for each way of generating what came of it."""
    with Float64():
        model, inputs = architecture.build()
        if not hasattr(model, "generate"):
            return dict.fromkeys(ways, "the class has no generate")
        dense = copy.deepcopy(model)
        found: dict[str, str] = {}
        expected: dict[str, torch.Tensor] = {}
        for way in ways:
            try:
                expected[way] = _tokens(dense, inputs, WAYS[way])
            except Exception as error:
                found[way] = f"dense: {_said(error)}"
        if not expected:
            return found
        try:
            given = {k: v for k, v in inputs.items() if k != "labels"}
            autotp.parallelize(model, tp, example_inputs=given, timeout=timedelta(minutes=3))
        except Exception as error:
            return found | {way: _said(error) for way in expected}
        for way, tokens in expected.items():
            try:
                found[way] = "equal" if torch.equal(tokens, _tokens(model, inputs, WAYS[way])) else "different"
            except Exception as error:
                found[way] = _said(error)
        programs = getattr(model.__dict__["_autotp"], "programs", None)
        return {way: found[way] for way in ways} | {
            "captures": "in parts" if programs is None else str(programs.captures.count)
        }


def _work(rank: int, tp: int, port: int, names: list[str], ways: list[str], out: str) -> None:
    join_as_rank(rank, tp, port)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    known = {str(a): a for a in architectures()}
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    for name in names:
        dist.barrier()
        start = time.monotonic()
        try:
            row = compare(known[name], tp, ways)
        except Exception as error:
            row = {way: f"dense: {_said(error)}" for way in ways}
        every: list[Any] = [None] * tp
        dist.all_gather_object(every, row)
        if rank == 0:
            differ = [
                f"rank {r}: {each}" for r, each in enumerate(every) if each != row and "Mismatch" not in str(each)
            ]
            row |= {"ranks differ": "; ".join(differ)} if differ else {}
            row["seconds"] = f"{time.monotonic() - start:.0f}"
            with Path(out).open("a") as file:
                file.write(json.dumps([name, row]) + "\n")
            cells = [row.get(k, "") for k in (*ways, "captures", "seconds", "ranks differ")]
            print("| " + " | ".join([name, *(c.replace("|", "\\|") for c in cells)]) + " |", flush=True)
    dist.destroy_process_group()


def main() -> int:
    """Compare, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.generate", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="kind/type, or a part of it; all dense ones by default")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ways", default=",".join(WAYS))
    args = parser.parse_args()
    every, ways = dense_names(), args.ways.split(",")
    names = [n for n in every if not args.names or any(n == x or (x not in every and x in n) for x in args.names)]
    print("| architecture | " + " | ".join([*ways, "captures", "seconds", "ranks differ"]) + " |")
    print("|" + "---|" * (len(ways) + 4))
    rows: dict[str, dict[str, str]] = {}
    while left := [n for n in names if n not in rows]:
        with tempfile.NamedTemporaryFile("r") as out:
            try:
                mp.spawn(_work, (args.tp, free_port(), left, ways, out.name), nprocs=args.tp)
            except Exception as error:
                rows |= dict(json.loads(line) for line in Path(out.name).read_text().splitlines())
                died = next(n for n in left if n not in rows)
                rows[died] = {way: f"a process ended: {_said(error)}" for way in ways}
                print(f"| {died} | {rows[died][ways[0]]} |", flush=True)
            else:
                rows |= dict(json.loads(line) for line in Path(out.name).read_text().splitlines())
    cells = [(name, row[way]) for name, row in rows.items() for way in ways]
    wrong = [c for c in cells if c[1] != "equal" and not c[1].startswith(("dense: ", "the class has no"))]
    print(
        f"\n{len(rows)} architectures, {len(cells)} ways: {sum(c[1] == 'equal' for c in cells)} equal, {len(wrong)} not"
    )
    return 1 if wrong or any("ranks differ" in row for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
