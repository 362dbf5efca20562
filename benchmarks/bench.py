"""Dense, autotp and hand-written tensor parallelism side by side, on one Llama, in one run.

Start it with::

    python benchmarks/bench.py

or ``OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/bench.py``. One thread a rank, gloo on CPUs;
the dense model runs on rank 0 while the others wait. All three have the same weights and are compared
(outputs, loss, every gradient) before anything is timed. They take turns, round by round, so that a busy
machine is as unkind to one as to the others: read the ratios, and the quartiles beside the medians.

Cases: ``prefill``, a forward without gradients that returns the last position's logits; ``train``, forward,
loss and backward, as ``model(input_ids, labels=...)`` does it. That returns the logits beside the loss, whole,
as a dense model would: a gather that the hand-written step does without. ``--loss-only`` has autotp split a
module that returns the loss alone, as a training script that reads no logits could. ``--profile`` adds where
the time goes. ``CPU ms`` is the processor time of all ranks together, which other processes on the machine
disturb less than the clock.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = 1e-4
NAMES = ("dense", "hand-written", "autotp")


class Count(TorchDispatchMode):
    """Counts the collectives that reach a process group, and the bytes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "barrier" not in func._schema.name:
            kind = func._schema.name.removeprefix("c10d::").strip("_").replace("all", "all_")
            self.calls[kind] += 1
            tensors = torch.utils._pytree.tree_leaves(args[0])
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


@dataclass
class Result:
    """One model in one case."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("hidden", 1024), ("layers", 8), ("heads", 16), ("kv-heads", 8), ("ffn", 2816),
                          ("vocab", 32000), ("rounds", 9), ("warmup", 1), ("tp", 2)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prefill", default="1x512", help="batch x sequence")
    parser.add_argument("--train", default="2x256", help="batch x sequence")
    parser.add_argument("--case", choices=("prefill", "train", "both"), default="both")
    parser.add_argument("--loss-only", action="store_true", help="autotp's model returns no logits in training")
    parser.add_argument("--profile", action="store_true", help="add where the time goes, by kind of operation")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    return parser.parse_args()


def distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference over the largest expected magnitude."""
    return float((expected - found).abs().max() / expected.abs().max())


class LossOnly(torch.nn.Module):
    """A language model that returns the loss where there are labels, else the logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> torch.Tensor:
        found = self.model(**kwargs)
        return found.loss if "labels" in kwargs else found.logits


class Bench:
    """The three models on this rank, and what a step of each case is for them."""

    def __init__(self, options: argparse.Namespace) -> None:
        import transformers

        import autotp
        from benchmarks.megatron import MegatronLlama

        transformers.logging.set_verbosity_error()
        self.options, self.rank, self.tp = options, dist.get_rank(), dist.get_world_size()
        self.cases = ("prefill", "train") if options.case == "both" else (options.case,)
        self.times: dict[str, float] = {}
        config = transformers.LlamaConfig(
            hidden_size=options.hidden, num_hidden_layers=options.layers, num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads, intermediate_size=options.ffn, vocab_size=options.vocab,
            max_position_embeddings=2048, tie_word_embeddings=False, attention_dropout=0.0,
        )  # fmt: skip
        torch.manual_seed(0)
        self.dense: Any = transformers.LlamaForCausalLM(config)
        self.parameters = sum(p.numel() for p in self.dense.parameters())
        self.inputs = {}
        for case in self.cases:
            shape = tuple(map(int, getattr(options, case).split("x")))
            self.inputs[case] = torch.randint(0, options.vocab, shape)
        self.hand = MegatronLlama(config, self.rank, self.tp)
        self.hand.load_state_dict(self.hand.parts(dict(self.dense.named_parameters())))
        self.auto: Any = copy.deepcopy(self.dense)
        if options.loss_only:
            self.auto = LossOnly(self.auto)
        self.plans = {}
        if self.rank == 0:
            for case in self.cases:
                self.mode(self.auto, case)
                with self.timed(f"autotp.plan, {case}"):
                    self.plans[case] = autotp.plan(self.auto, self.tp, example_inputs=self.kwargs(case))
        dist.barrier()
        first = self.cases[-1]  # which decides how the weights are split; the other case follows
        self.mode(self.auto, first)
        with self.timed(f"autotp.parallelize, {first}"):
            autotp.parallelize(self.auto, self.tp, example_inputs=self.kwargs(first))
        gc.collect()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[what] = time.perf_counter() - start

    def kwargs(self, case: str) -> dict[str, Any]:
        ids = self.inputs[case]
        return {"input_ids": ids, "use_cache": False, **({"labels": ids} if case == "train" else {"logits_to_keep": 1})}

    @staticmethod
    def mode(model: torch.nn.Module, case: str) -> None:
        model.train(case == "train")

    def step(self, name: str, case: str) -> torch.Tensor:
        """One step; the logits or the loss."""
        model = {"dense": self.dense, "hand-written": self.hand, "autotp": self.auto}[name]
        self.mode(model, case)
        ids = self.inputs[case]
        if case == "prefill":
            with torch.no_grad():
                if model is self.hand:
                    return model.last_logits(ids)
                found = model(**self.kwargs(case))
                return found if isinstance(found, torch.Tensor) else found.logits
        for p in model.parameters():
            p.grad = None
        found = model.loss(ids, ids) if model is self.hand else model(**self.kwargs(case))
        loss = found if isinstance(found, torch.Tensor) else found.loss
        loss.backward()
        return loss.detach()

    def check(self) -> dict[str, float]:
        """The largest relative differences from dense on any rank. Collective."""
        import autotp

        found: dict[str, float] = {}
        for case in self.cases:
            expected = self.step("dense", case)
            for name in ("hand-written", "autotp"):
                with self.timed(f"autotp, first call of {case}") if name == "autotp" else self.timed(""):
                    value = self.step(name, case)
                found[f"{name}, {'logits' if case == 'prefill' else 'loss'}"] = distance(expected, value)
            if case == "train":
                dense = {n: p.grad for n, p in self.dense.named_parameters()}
                mine, parts = dict(self.hand.named_parameters()), self.hand.parts(dense)
                found["hand-written, gradients"] = max(distance(g, mine[n].grad) for n, g in parts.items())
                whole = {n.removeprefix("model.") if self.options.loss_only else n: g
                         for n, g in autotp.full_gradients(self.auto).items()}  # fmt: skip
                found["autotp, gradients"] = max(distance(g, whole[n]) for n, g in dense.items())
        self.times.pop("", None)
        every: list[Any] = [None] * self.tp
        dist.all_gather_object(every, found)
        return {n: max(each[n] for each in every) for n in found}

    def measure(self, case: str) -> dict[str, Result]:
        """Times and collectives of all models in one case; the slowest rank's time. Collective."""
        import autotp

        results = {name: Result() for name in NAMES}
        for i in range(self.options.warmup + self.options.rounds):
            for name in NAMES if i % 2 else NAMES[::-1]:
                dist.barrier()
                start, busy = time.perf_counter(), time.process_time()
                if name != "dense" or self.rank == 0:
                    self.step(name, case)
                if i >= self.options.warmup:
                    results[name].seconds.append(time.perf_counter() - start)
                    results[name].cpu.append(time.process_time() - busy)
        for name, result in results.items():
            every: list[Any] = [None] * self.tp
            dist.all_gather_object(every, (result.seconds, result.cpu))
            result.seconds = [max(each) for each in zip(*(s for s, _ in every))]
            result.cpu = [sum(each) for each in zip(*(c for _, c in every))]
            if name != "dense":
                with autotp.Tally() if name == "autotp" else Count() as count:
                    self.step(name, case)
                result.calls, result.bytes = dict(count.calls), dict(count.bytes)
        return results


KINDS = (
    ("collectives, with waiting", r"collective$|c10d::|record_param_comms"),
    ("attention", r"scaled_dot_product|flash_attention"),
    ("matrix products", r"aten::(mm|addmm|bmm|baddbmm|mkldnn_linear|_mkl_linear|linear|matmul)$|mkldnn|mkl_"),
    ("softmax and cross entropy", r"softmax|nll|CrossEntropy|logsumexp"),
    ("norms", r"rms_norm|rsqrt|pow|mean$|norm"),
    ("copies, cat, fill", r"copy_|cat$|clone|fill_|zero_|contiguous|constant_pad|index|gather|scatter|to$|_to_copy"),
    ("views", r"view|reshape|transpose|slice|split|chunk|unsqueeze|expand|select|permute|as_strided|^aten::t$|alias|"
              r"detach|narrow|squeeze"),
    ("elementwise", r"aten::(add|mul|sub|div|neg|silu|exp|sum|where|masked|ge|lt|le|bitwise|logical|cos|sin|ne|eq|"
                    r"amax)"),
)  # fmt: skip


def profile(bench: Bench, case: str, steps: int = 3) -> dict[str, dict[str, Any]]:
    """Milliseconds a step by kind of operation, on rank 0. Profiling itself slows many small operations."""
    from autotp.shared_memory import SharedMemory

    places: list[tuple[Any, str]] = [(at, n) for at in (dist, SharedMemory) for n in ("all_reduce", "all_gather")]
    wrapped: list[tuple[Any, str, Callable[..., Any]]] = [(at, n, getattr(at, n)) for at, n in places]

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function("collective"):
                return function(*args, **kwargs)

        return call

    found = {}
    for at, name, function in wrapped:
        setattr(at, name, recorded(function))
    try:
        for model in NAMES:
            dist.barrier()
            if model == "dense" and bench.rank:
                continue
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
                start = time.perf_counter()
                for _ in range(steps):
                    bench.step(model, case)
                wall = time.perf_counter() - start
            kinds: dict[str, float] = defaultdict(float)
            ops: dict[str, tuple[float, float]] = {}
            count = 0
            for event in record.key_averages():
                if event.key.startswith(("gloo:", "nccl:")):
                    continue  # on the group's own threads
                kind = next((k for k, p in KINDS if re.search(p, event.key)), "other operations")
                kinds[kind] += event.self_cpu_time_total / steps / 1e3
                ops[event.key] = (event.count / steps, event.self_cpu_time_total / steps / 1e3)
                count += event.count
            kinds["Python, between operations"] = wall / steps * 1e3 - sum(kinds.values())
            found[model] = {"kinds": dict(kinds), "ops": ops, "count": count / steps, "wall": wall / steps * 1e3}
    finally:
        for at, name, function in wrapped:
            setattr(at, name, function)
    dist.barrier()
    return found


def _size(count: float) -> str:
    from autotp.report import bytes_text

    return bytes_text(count)


def table(*columns: str) -> Table:
    made = Table(pad_edge=False, box=None)
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if i else "left", no_wrap=True)
    return made


def show_results(case: str, shape: str, results: dict[str, Result]) -> list[Any]:
    made = table(case, "median ms", "quartiles", "min..max", "to hand-written", "CPU ms", "to hand-written",
                 "collectives", "bytes")  # fmt: skip
    reference, work = results["hand-written"].median, statistics.median(results["hand-written"].cpu)
    for name in NAMES:
        r = results[name]
        low, high = r.quartiles
        calls = " + ".join(f"{n} {kind}" for kind, n in sorted(r.calls.items())) or "none"
        made.add_row(
            name, f"{1e3 * r.median:.1f}", f"{1e3 * low:.1f}..{1e3 * high:.1f}",
            f"{1e3 * min(r.seconds):.1f}..{1e3 * max(r.seconds):.1f}", f"{r.median / reference:.3f}",
            f"{1e3 * statistics.median(r.cpu):.0f}", f"{statistics.median(r.cpu) / work:.3f}", calls,
            _size(sum(r.bytes.values())),
        )  # fmt: skip
    ratios = sorted(a / b for a, b in zip(results["autotp"].seconds, results["hand-written"].seconds))
    note = f"autotp to hand-written round by round: median {statistics.median(ratios):.3f}, "
    what = "forward, no gradients, last logits" if case == "prefill" else "forward, loss, backward"
    return ["", f"{case} {shape}: {what}", made, f"{note}{ratios[0]:.3f}..{ratios[-1]:.3f}"]


def show_profile(case: str, found: dict[str, dict[str, Any]]) -> list[Any]:
    made = table(f"{case}: ms a step, rank 0, profiled", *NAMES, "autotp - hand-written")
    kinds = sorted({k for each in found.values() for k in each["kinds"]},
                   key=lambda k: -found["autotp"]["kinds"].get(k, 0))  # fmt: skip
    for kind in kinds:
        values = [found[m]["kinds"].get(kind, 0.0) for m in NAMES]
        made.add_row(kind, *(f"{v:.1f}" for v in values), f"{values[2] - values[1]:+.1f}")
    walls = [found[m]["wall"] for m in NAMES]
    made.add_row("in all", *(f"{w:.1f}" for w in walls), f"{walls[2] - walls[1]:+.1f}")
    counts = [found[m]["count"] for m in NAMES]
    made.add_row("operations", *(f"{c:.0f}" for c in counts), f"{counts[2] - counts[1]:+.0f}")
    ops = table("where they differ most", "times", "ms", "hand-written: times", "ms ", "difference")
    auto, hand = found["autotp"]["ops"], found["hand-written"]["ops"]
    nothing = (0.0, 0.0)
    differing = sorted(auto.keys() | hand.keys(), key=lambda k: -abs(auto.get(k, nothing)[1] - hand.get(k, nothing)[1]))
    for key in differing[:16]:
        (n, a), (m, b) = auto.get(key, nothing), hand.get(key, nothing)
        ops.add_row(key[:48], f"{n:.0f}", f"{a:.2f}", f"{m:.0f}", f"{b:.2f}", f"{a - b:+.2f}")
    return ["", made, "", ops]


def run(options: argparse.Namespace) -> int:
    """One rank; rank 0 prints. The exit code."""
    from autotp.report import render

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    bench = Bench(options)
    errors = bench.check()
    ok = all(e <= TOLERANCE for e in errors.values())
    o = options
    if bench.rank == 0:
        cpu = platform.processor() or platform.machine()
        made = table("largest relative difference from dense", "")
        for name, error in errors.items():
            made.add_row(name, f"{error:.1e}")
        compile_times = table("once, before the first step", "s")
        for name, seconds in bench.times.items():
            compile_times.add_row(name, f"{seconds:.1f}")
        print(
            render(
                f"\nLlama, hidden {o.hidden}, {o.layers} layers, {o.heads} heads, {o.kv_heads} KV heads, ffn {o.ffn}, "
                f"vocabulary {o.vocab}: {bench.parameters / 1e6:.1f}M parameters, float32",
                f"{bench.tp} gloo ranks of one thread, {os.cpu_count()} CPUs ({cpu}), torch {torch.__version__}; "
                f"{o.rounds} rounds after {o.warmup}",
                "",
                made,
                "" if ok else f"NOT EQUAL to {TOLERANCE:g}: nothing is timed",
                compile_times,
            ),
            flush=True,
        )
    if not ok:
        return 1
    if bench.rank:
        bench.dense = None
        gc.collect()
    record: dict[str, Any] = {"options": vars(o), "torch": torch.__version__, "errors": errors, "once": bench.times}
    for case in bench.cases:
        results = bench.measure(case)
        record[case] = {
            n: {**asdict(r), "median": r.median, "median_cpu": statistics.median(r.cpu)} for n, r in results.items()
        }
        parts = show_results(case, getattr(o, case), results)
        if o.profile:
            found = profile(bench, case)
            if bench.rank == 0:
                record[case]["profile"] = found
                parts += show_profile(case, found)
        if bench.rank == 0:
            print(render(*parts, width=160), flush=True)
    if bench.rank == 0 and o.json:
        with open(o.json, "w") as file:
            json.dump(record, file, indent=1)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def main() -> int:
    """Start the processes, or be one of them."""
    options = arguments()
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if "RANK" in os.environ:
        return run(options)
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "5", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.tp)]
    return subprocess.call([*command, __file__, *sys.argv[1:]], env={**os.environ, **quiet})


if __name__ == "__main__":
    sys.exit(main())
