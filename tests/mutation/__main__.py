"""Break programs in every place and count what the proof lets through: ``python -m tests.mutation [NAME:TP ...]``.

Each mutant is judged by its numbers first (all ranks in lockstep against the dense model, every gradient). One
that changes nothing is equivalent and counted apart; every other must be refused. Exits 1 if one is not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.mutation.judge import subject

SUBJECTS = ("gpt:2", "gpt:3", "gpt2:2", "llama:2", "llama:3", "llama:4", "neox:3", "bloom:2", "bert:3", "encoder:3")

FATES = {
    (True, False): "refused",
    (True, True): "got through",
    (False, True): "equivalent",
    (False, False): "refused though equal",
}
"""By whether the numbers differ, and whether it is proved."""


def main() -> int:
    """Run, print a line for each kind of mutant, and name those that get through."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", default=SUBJECTS, help="a model of tests.models and a number of ranks")
    options = parser.parse_args()
    count: Counter[tuple[str, str]] = Counter()
    through, start = [], time.monotonic()
    for each in options.subjects:
        name, tp = each.split(":")
        it = subject(name, int(tp))
        assert it.verdict(it.program).proved, it.verdict(it.program)
        for mutant in it.mutants():
            differs, proved = it.differs(mutant.program), it.verdict(mutant.program).proved
            fate = (
                ("got through" if proved else "refused")
                if differs
                else ("equivalent" if proved else "refused though equal")
            )
            count[mutant.kind, fate] += 1
            if differs and proved:
                through.append(f"{each}: {mutant.kind} at {mutant.place}")
        print(f"[{time.monotonic() - start:.0f} s] {each}: {sum(count.values())} mutants so far", flush=True)
    fates = list(FATES.values())
    print(f"{'kind':<18}" + "".join(f"{f:>22}" for f in fates))
    for kind in dict.fromkeys(k for k, _ in count):
        print(f"{kind:<18}" + "".join(f"{count[kind, f]:>22}" for f in fates))
    print(f"{'all':<18}" + "".join(f"{sum(count[k, f] for k in {k for k, _ in count}):>22}" for f in fates))
    for each in through:
        print(f"GOT THROUGH {each}")
    return 1 if through else 0


if __name__ == "__main__":
    sys.exit(main())
