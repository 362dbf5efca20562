"""Tensor parallelism by autotp, by hand, by DTensor and by transformers side by side, on one Llama, in one run.

Start it with::

    python benchmarks/bench.py

or ``OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/bench.py``. One thread a rank, gloo on CPUs;
the dense model runs on rank 0 while the others wait. All have the same weights and are compared with the
dense model (logits, loss, every gradient) before anything is timed. They take turns, round by round, so that
a busy machine is as unkind to one as to the others: read the ratios, which are medians of the rounds'
ratios, and the quartiles beside them.

Cases: ``prefill``, a forward without gradients that returns the last position's logits; ``decode``, one token
on a cache of keys and values; ``train``, forward, loss and backward, where the models return the loss alone,
as a training script that reads no logits would have it (``--logits``: those of transformers return logits,
too, as they do unless told otherwise: for autotp a gather more, which the hand-written step does without);
the same on a model so small that nothing but overhead is left; and autotp at tp=1 beside the dense module.

The models differ in how ranks exchange values, too: autotp through memory (``--model autotp-gloo``: through
gloo), all others through gloo. ``--passes`` says what each lowering pass gives: autotp without that one, to
autotp with all. ``--profile`` adds where the time goes, ``--memory`` what loading and a
training step need. ``CPU ms`` is the processor time of all ranks together, which other processes on the
machine disturb less than the clock. Python's garbage collector rests while a step is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[0] = ROOT
MODELS = ("dense", "hand-written", "autotp", "autotp-gloo", "DTensor", "transformers-TP")
CASES = ("prefill", "decode", "train", "tiny-decode", "tiny-train", "tp=1")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("layers", 8), ("heads", 16), ("kv-heads", 8), ("ffn", 2816),
                          ("vocab", 32000), ("rounds", 7), ("warmup", 1), ("tp", 2)):  # fmt: skip
        more = " (light cases have more)" if name == "rounds" else ""
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}{more}")
    parser.add_argument("--prefill", default="1x512", help="batch x sequence")
    parser.add_argument("--train", default="2x256", help="batch x sequence")
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES, help="which cases")
    parser.add_argument("--model", nargs="+", choices=MODELS, help="which models beside the hand-written one; "
                        "all but autotp-gloo")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="add autotp's model under torch.compile")
    parser.add_argument("--passes", action="store_true", help="add autotp's model without each of the lowering passes")
    parser.add_argument("--logits", action="store_true", help="transformers' models return logits in training, too")
    parser.add_argument("--profile", action="store_true", help="add where the time goes, by kind of operation")
    parser.add_argument("--memory", action="store_true", help="add peak memory, in processes of its own")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument("--plot", metavar="FILE", help="also draw the final table, as SVG")
    parser.add_argument("--record", help=argparse.SUPPRESS)  # the process that started this one writes the files
    return parser


def chosen(options: argparse.Namespace) -> list[str]:
    """The models' names in tables."""
    wanted = options.model or [m for m in MODELS if m != "autotp-gloo"]
    names = [m.replace("-TP", " TP").replace("-gloo", " gloo") for m in MODELS if m in wanted or m == "hand-written"]
    if options.compile and "autotp" in names:
        names.insert(names.index("autotp") + 1, "autotp compiled")
    if options.passes and "autotp" in names:
        from benchmarks.models import WITHOUT

        names += WITHOUT
    return names


class Bench:
    """One rank's part of a run; rank 0 prints.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import torch.distributed as dist

        from benchmarks import cases

        self.options, self.names = options, chosen(options)
        self.rank, self.tp = dist.get_rank(), dist.get_world_size()
        self.cases = [c for c, name in zip(cases.CASES, CASES, strict=True) if name in options.case]
        for i, case in enumerate(self.cases):
            if case.name in ("prefill", "train"):
                batch, sequence = map(int, getattr(options, case.name).split("x"))
                self.cases[i] = dataclasses.replace(case, batch=batch, sequence=sequence)
        self.ok = True
        self.record: dict[str, Any] = {"options": vars(options), "models": {}, "once": {}, "cases": {}}

    def sizes(self, size: str) -> list[int]:
        """Hidden, layers, heads, key-value heads, ffn, words."""
        o = self.options
        if size == "main":
            return [o.hidden, o.layers, o.heads, o.kv_heads, o.ffn, o.vocab]
        return [64, 8, 2 * max(2, self.tp), max(2, self.tp), 176, 1000]

    def show(self, *parts: Any) -> None:
        from autotp.utils.tables import render

        if self.rank == 0:
            print(render(*parts, width=180), flush=True)

    def run(self) -> None:
        """All cases, model by model."""
        import torch

        from benchmarks.report import show_final, show_passes

        cpu = platform.processor() or platform.machine()
        before = os.getloadavg()[0]
        self.record |= {"torch": torch.__version__, "cpus": os.cpu_count(), "ranks": self.tp}
        self.show(f"{self.tp} gloo ranks of one thread, {os.cpu_count()} CPUs ({cpu}), torch {torch.__version__}")
        for size in ("main", "tiny"):
            mine = [c for c in self.cases if c.size == size and not c.solo]
            alone = [c for c in self.cases if c.size == size and c.solo]
            if mine or alone:
                self.model(size, mine, alone)
        self.show(*show_final(self.record["cases"]))
        if self.options.passes:
            self.show(*show_passes(self.record["cases"]))
        self.record["load"] = before, os.getloadavg()[0]
        self.show("", "load average {:.1f} before, {:.1f} at the end".format(*self.record["load"]))

    def model(self, size: str, mine: list[Any], alone: list[Any]) -> None:
        """The cases of one size of model."""
        import torch
        import transformers

        from benchmarks.models import Competitor, Llama, config
        from benchmarks.report import show_once

        sizes = self.sizes(size)
        torch.manual_seed(0)
        torch.compiler.reset()
        kind = transformers.LlamaForCausalLM if self.options.logits else Llama
        dense = Competitor("dense", kind(config(*sizes)), alone=True)
        count = sum(p.numel() for p in dense.module.parameters())
        hidden, layers, heads, kv_heads, ffn, vocab = sizes
        title = (
            f"Llama ({size}), hidden {hidden}, {layers} layers, {heads} heads, {kv_heads} KV heads, ffn {ffn}, "
            f"vocabulary {vocab}: {count / 1e6:.1f}M parameters, float32"
        )
        self.record["models"][size] = {"sizes": sizes, "parameters": count, "title": title}
        self.show("", title)
        once = self.record["once"].setdefault(size, {})
        if mine:
            for case in mine:
                self.planned(dense, case, vocab, once)
            models = self.competitors(dense, mine, vocab, once)
            for case in mine:
                self.measured(case, vocab, dense, models, once)
            self.show("", show_once(once))
        for case in alone:
            self.measured(case, vocab, dense, self.alone(dense, case, vocab), once)
        gc.collect()

    def planned(self, dense: Any, case: Any, vocab: int, once: dict[str, float]) -> None:
        """How long a plan takes, capture included."""
        import torch.distributed as dist

        import autotp
        from benchmarks.cases import example

        if self.rank == 0 and case.kind != "decode" and "autotp" in self.names:
            dense.module.train(case.kind == "train")
            start = time.perf_counter()
            with contextlib.suppress(Exception):  # parallelize will say it
                autotp.plan(dense.module, self.tp, example_inputs=example(case, vocab))
                once[f"autotp.plan, {case.name}"] = time.perf_counter() - start
        dist.barrier()

    def competitors(self, dense: Any, cases: list[Any], vocab: int, once: dict[str, float]) -> list[Any]:
        from benchmarks.cases import example
        from benchmarks.models import make

        first = next((c for c in cases if c.kind == "train"), cases[0])  # which decides how weights are split
        return make(self.names, dense, example(first, vocab), first.kind == "train", once)

    def alone(self, dense: Any, case: Any, vocab: int) -> list[Any]:
        from benchmarks.cases import example
        from benchmarks.models import make_alone

        return make_alone(dense, example(case, vocab), self.options.compile, self.options.passes)

    def measured(self, case: Any, vocab: int, dense: Any, models: list[Any], once: dict[str, float]) -> None:
        """Check, measure and show one case."""
        from benchmarks.cases import Work
        from benchmarks.measure import check, measure
        from benchmarks.profiling import profile, show_profile
        from benchmarks.report import recorded, show_case

        work = Work(case, vocab)
        results = check(work, dense, models, once)
        measure(work, models, results, self.options.rounds * case.rounds, self.options.warmup * case.rounds)
        self.ok &= not any(r.failed for r in results.values())
        record = self.record["cases"][case.name] = recorded(case, results)
        self.show(*show_case(case.name, record))
        if self.options.profile:
            found = profile(work, [m for m in models if not results[m.name].failed])
            if self.rank == 0:
                record["profile"] = found
                self.show(*show_profile(case.name, found))


def be_rank(options: argparse.Namespace) -> int:
    """One of the processes. The exit code: 1 if a model failed, or has other numbers than the dense one."""
    import torch
    import torch.distributed as dist
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.compile and "TORCH_LOGS" not in os.environ:
        torch._logging.set_logs(dynamo=logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    bench = Bench(options)
    bench.run()
    bench.record["ok"] = bench.ok
    if bench.rank == 0:
        if options.record:
            with open(options.record, "w") as file:
                json.dump(bench.record, file)
        else:
            write(options, bench.record)
    dist.barrier()
    dist.destroy_process_group()
    return int(not bench.ok and not options.record)


def write(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """The files that were asked for."""
    from benchmarks.plot import svg

    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
    if options.plot:
        with open(options.plot, "w") as file:
            file.write(svg(record["cases"]))


def main() -> int:
    """Start the processes, or be one of them."""
    parser = arguments()
    options = parser.parse_args()
    if "RANK" in os.environ:
        return be_rank(options)
    from benchmarks.memory import QUIET, measure_memory, torchrun

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "record.json")
        line = torchrun(options.tp, os.path.abspath(__file__), *sys.argv[1:], "--record", path)
        code = subprocess.call(line, env={**os.environ, **QUIET})
        if code:
            return code
        with open(path) as file:
            record = json.load(file)
    record["options"].pop("record")
    if options.memory:
        from autotp.utils.tables import render
        from benchmarks.report import show_memory

        batch, sequence = map(int, options.train.split("x"))
        sizes = [options.hidden, options.layers, options.heads, options.kv_heads, options.ffn, options.vocab]
        record["memory"] = measure_memory(chosen(options), sizes, options.tp, batch, sequence)
        print(render(*show_memory(record["memory"]), width=160))
    write(options, record)
    return int(not record["ok"])


if __name__ == "__main__":
    sys.exit(main())
