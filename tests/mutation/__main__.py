"""Break programs in every place and count what the proof lets through: ``python -m tests.mutation [NAME:TP ...]``.

Each mutant is judged by its numbers first (all ranks in lockstep against the dense model, every gradient). One
that changes nothing is equivalent and counted apart; every other must be refused. Exits 1 if one is not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.mutation.judge import FATES, judged

SUBJECTS = ("gpt:2", "gpt:3", "gpt2:2", "llama:3", "llama:4", "neox:3", "bloom:2", "bert:3", "encoder:3",
            "seq2seq/t5:2", "causal/olmo2:3", "causal/falcon:2", "causal/gemma2:3", "causal/gpt_bigcode:3",
            "causal/phi3:2", "causal/qwen3:4", "causal/mpt:2", "causal/gptj:3", "causal/opt:2", "seq2seq/bart:3",
            "masked/deberta:2", "causal/mixtral:3")  # fmt: skip


def main() -> int:
    """Run, print a line for each kind of mutant, and name those that get through."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", default=SUBJECTS, help="a model and a number of ranks")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    count: Counter[tuple[str, str]] = Counter()
    through, start = list[str](), time.monotonic()
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for each, found, names in pool.map(judged, options.subjects):
            count += found
            through += names
            print(f"[{time.monotonic() - start:.0f} s] {each}: {sum(found.values())} mutants", flush=True)
    fates = list(FATES.values())
    print(f"{'kind':<22}" + "".join(f"{f:>22}" for f in fates) + f"{'kill rate':>12}")
    for kind in (*dict.fromkeys(k for k, _ in count), "all"):
        row = [sum(n for (k, fate), n in count.items() if fate == f and kind in (k, "all")) for f in fates]
        print(f"{kind:<22}" + "".join(f"{n:>22}" for n in row) + f"{row[0] / max(1, row[0] + row[1]):>12.2%}")
    for each in through:
        print(f"GOT THROUGH {each}")
    return 1 if through else 0


if __name__ == "__main__":
    sys.exit(main())
