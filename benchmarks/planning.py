"""What capture, plan and rewrite take, by layers: the default 7B Llama on the meta device.

    python benchmarks/planning.py [--layers 8 32 80] [--tp 8]

Each size has a process of its own. Times are CPU seconds, which other work on the machine changes
less than seconds of the clock; ``layer`` is what each layer beyond the smallest size's takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from autotp.capture.capture import capture
from autotp.capture.example_inputs import example_call
from autotp.program.rank_graph import RankGraph
from autotp.program.sharded_program import ShardedProgram
from passes import assign, decide, enter, minimum, propagate, shard

STEPS = ("capture", "plan", "rewrite")


def measure(layers: int, tp: int) -> dict[str, float]:
    """The times of each step, and how many nodes were captured."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))
    args, kwargs = example_call(model, None)
    found: dict[str, float] = {}

    def timed(step: str, call: Callable[[], Any]) -> Any:
        begin = time.process_time()
        result = call()
        found[step] = found.get(step, 0.0) + time.process_time() - begin
        return result

    captured = timed("capture", lambda: capture(model, args, kwargs))
    facts = timed("plan", lambda: propagate(captured.graph))
    decision = timed("plan", lambda: decide(captured.graph, facts, tp))

    def rewrite() -> ShardedProgram:
        layouts = assign(captured.graph, facts, decision.weight_layouts, tp)
        sharded = shard(captured.graph, facts, layouts, dict(decision.weight_layouts), tp)
        sharded.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        enter(sharded.graph)
        fewest = minimum(captured.graph, facts, layouts, decision.weight_layouts)
        reasons = decision.reasons
        rewritten = ShardedProgram(
            captured, sharded.graph, decision.weight_layouts, reasons, sharded.gathered, tp, fewest
        )
        RankGraph(rewritten, 0, model)
        return rewritten

    timed("rewrite", rewrite)
    assert all(n in decision.weight_layouts for n, p in model.named_parameters() if p.dim() > 1)
    return {"nodes": len(captured.graph.nodes), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 80])
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.tp)))
        return
    print(f"torch {torch.__version__}, tp={options.tp}, CPU seconds")
    print(f"{'layers':>6} {'nodes':>6} " + " ".join(f"{s:>9}" for s in (*STEPS, "all", "a layer")))
    least: tuple[int, float] | None = None
    for layers in sorted(options.layers):
        command = [sys.executable, __file__, "--one", str(layers), "--tp", str(options.tp)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        total = sum(found[s] for s in STEPS)
        least = least or (layers, total)
        each = f"{(total - least[1]) / (layers - least[0]):9.3f}" if layers > least[0] else ""
        times = " ".join(f"{found[s]:9.2f}" for s in STEPS)
        print(f"{layers:6} {found['nodes']:6} {times} {total:9.2f} {each}", flush=True)


if __name__ == "__main__":
    main()
