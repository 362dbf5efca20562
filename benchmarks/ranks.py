"""What one rank does by itself: how the time of a rank's program falls with the number of ranks.

    python benchmarks/ranks.py                 # on a GPU: Llama 3 8B's sizes, bfloat16; without one: small
    python benchmarks/ranks.py --tp 1 8 --ranks ends --layers 8

For each number of ranks the programs of all of them run one after another on one device, each with its own
share of the weights (random ones), and with collectives in a group of one rank (NCCL's on a GPU, gloo's on
a CPU): they cost their launch, and no waiting. Beside decoding stands the time in which the device reads the
rank's weights once, beside prefill the time in which it does the rank's arithmetic, both at the speeds
measured in the same run: of a large copy, and of a large product of matrices. What is not a rank's
share (norms, the rotary embedding, launches) does not fall, and shows as efficiency that does.

Before that two gloo ranks that share the device are compared with the dense model, in float64: logits,
loss and every gradient (``--no-check`` leaves it out).
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab")
LARGE, SMALL = (4096, 32, 32, 8, 14336, 128256), (512, 4, 8, 4, 1408, 8192)
TOLERANCE = 1e-5
"""In float64, but transformers' Llama computes norms and rotary angles in float32."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--ranks", choices=("all", "ends", "first"), default="all", help="of which programs run")
    parser.add_argument("--compile", default="default", help="a mode of torch.compile, or none; default: default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default bfloat16 on a GPU, else float32")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens; default 2048 on a GPU, 256 without one")
    parser.add_argument("--cache", type=int, default=128, help="tokens before the decoded ones; default 128")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison with the dense model")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)  # the processes that compare
    return parser


def device() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def config(sizes: Sequence[int]) -> Any:
    from benchmarks import models

    return models.config(*sizes)


def compared() -> None:
    """One of two gloo ranks on one device: its model beside the dense one."""
    import torch
    import torch.distributed as dist
    import transformers

    import autotp

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(config((64, 3, 8, 2, 176, 1000))).double().to(device())
    for name, parameter in dense.named_parameters():  # norms are ones at first, which hides mistakes
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ids = torch.randint(0, 1000, (2, 33), device=device())
    output = dense(input_ids=ids, labels=ids)
    output.loss.backward()
    expected = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    expected |= {f"gradient of {n}": p.grad for n, p in dense.named_parameters()}
    del output
    dense.zero_grad()
    model = autotp.parallelize(dense, 2, example_inputs={"input_ids": ids, "labels": ids})
    found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    whole = autotp.full_gradients(model)
    values = {"logits": found.logits, "loss": found.loss} | {f"gradient of {n}": g for n, g in whole.items()}
    apart = {n: _distance(x, values[n]) for n, x in expected.items()}
    worst = max(apart, key=apart.__getitem__)
    far = apart[worst]
    if dist.get_rank() == 0:
        print(f"two gloo ranks on {device()}: {len(apart)} values compared, the worst {worst}: {far:.1e}", flush=True)
    dist.destroy_process_group()
    if not far <= TOLERANCE:
        sys.exit(f"not the dense model's numbers: {worst}: {far:.1e}")


def _distance(expected: Any, found: Any) -> float:
    difference = float((expected - found.detach()).abs().max() / expected.abs().max())
    return difference if math.isfinite(difference) else math.inf


def alone(rank: int, tp: int) -> Any:
    """A rank's context, alone of ``tp``: each group's collectives run in a group of one process."""
    import torch
    import torch.distributed as dist

    from autotp.distributed.communicators import ProcessCommunicator
    from autotp.distributed.mesh import Mesh
    from autotp.distributed.process_context import ProcessContext
    from passes.ops import context

    class OfOne(ProcessCommunicator):
        def all_gather(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
            found = [tensor.new_zeros(list(s)) for s in shapes]
            dist.all_gather([found[self.rank]], tensor.contiguous())
            return found

    class Alone(ProcessContext):
        def _make(self, name: str) -> Any:
            _, parts = context.parse_group(name)
            members = next((p for p in parts if rank in p), list(range(tp)))
            assert dist.group.WORLD is not None
            return OfOne(dist.group.WORLD, members.index(rank), len(members), self.missing)

    return Alone(Mesh(rank, tp, None), 0, lambda failure: failure)


def ranks(model: Any, tp: int, which: str, example: dict[str, Any], options: Any) -> Iterator[tuple[int, Any]]:
    """The model as each rank has it, one after another; they are one object, whose shares are made anew."""
    import torch

    from autotp.distributed.agreement import Agreement
    from autotp.distributed.mesh import Mesh
    from autotp.options import Options
    from autotp.partition.partition import partition_model
    from autotp.runtime.graph_runtime import GraphRuntime
    from autotp.weights.slicing import shards_of

    division = partition_model(model, tp, (), example)
    (part,) = division.parts
    part.cache.options = Options(compile=options, check=True)
    layouts = division.weight_layouts
    part.calls.clear()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for rank in {"all": range(tp), "ends": sorted({0, tp - 1}), "first": [0]}[which]:
        for name, parameter in model.named_parameters():
            local = list(shapes[name])
            for dim, shards in shards_of(layouts, name).items():
                local[dim] = shards.counts[rank]
            parameter.data = torch.empty(local, dtype=parameter.dtype, device=parameter.device).normal_(0, 0.02)
        torch.compiler.reset()
        context = alone(rank, tp)
        GraphRuntime(model, part.cache, Agreement(Mesh(rank, tp, None), "Llama"), context).attach()
        yield rank, model
        part.cache.reset({})


def median(step: Callable[[], Any], rounds: int, warmup: int = 3) -> float:
    """Seconds of a step, the device's work included."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    seconds = []
    for i in range(warmup + rounds):
        wait()
        start = time.perf_counter()
        step()
        wait()
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def limits(dtype: Any) -> tuple[float, float]:
    """Bytes a second that a large copy reads and writes, and operations a second of a large product."""
    import torch

    large = torch.cuda.is_available()
    source = torch.empty((1 << 30 if large else 1 << 28) // dtype.itemsize, dtype=dtype, device=device()).normal_()
    target = torch.empty_like(source)
    copied = median(lambda: target.copy_(source), 10)
    n = 8192 if large else 1024
    a, b = (torch.empty(n, n, dtype=dtype, device=device()).normal_() for _ in range(2))
    return 2 * source.nbytes / copied, 2 * n**3 / median(lambda: a @ b, 10)


def measured(model: Any, tokens: int, cached: int, rounds: int) -> tuple[float, float]:
    """Seconds of one token on a cache, and of a prefill."""
    import torch
    import transformers

    words = model.config.vocab_size
    with torch.inference_mode():
        cache = transformers.DynamicCache(config=model.config)
        ids = torch.randint(0, words, (1, cached), device=device())
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = ids[:, :1]

        def decode() -> None:
            model(input_ids=token, past_key_values=cache, use_cache=True)
            cache.crop(-1)

        decoded = median(decode, rounds)
        ids = torch.randint(0, words, (1, tokens), device=device())
        return decoded, median(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), max(3, rounds // 2))


def work(model: Any, tokens: int) -> tuple[int, int]:
    """Bytes of the weights that a token reads, and operations of a prefill of one sequence."""
    table = model.get_input_embeddings().weight
    weights = [p for p in model.parameters() if p is not table]
    head = model.get_output_embeddings().weight
    products = sum(p.numel() for p in weights if p.dim() > 1 and p is not head)
    queries = sum(p.shape[0] for n, p in model.named_parameters() if n.endswith("q_proj.weight"))  # of all layers
    attention = 2 * tokens**2 * queries  # q k and p v of the lower half
    return sum(p.nbytes for p in weights), 2 * products * tokens + 2 * head.numel() + attention


def main() -> int:
    """Compare, then measure rank by rank."""
    options = arguments().parse_args()
    if options.check:
        compared()
        return 0
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    os.environ |= quiet
    if not options.no_check:
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        if subprocess.call([*line, "--check"]):
            return 1
    import tempfile

    import torch
    import torch.distributed as dist
    import transformers

    from autotp.utils.tables import bytes_text, render
    from benchmarks.report import number, table

    transformers.logging.set_verbosity_error()
    large = torch.cuda.is_available()
    given = [getattr(options, name) for name in SIZES]
    sizes = [a or b for a, b in zip(given, LARGE if large else SMALL, strict=True)]
    tokens = options.prefill if large else min(options.prefill, 256)
    dtype = getattr(torch, options.dtype or ("bfloat16" if large else "float32"))
    name = torch.cuda.get_device_name() if large else f"CPU, {torch.get_num_threads()} thread"
    compiled = None if options.compile == "none" else {} if options.compile == "default" else {"mode": options.compile}
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if large else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        bandwidth, peak = limits(dtype)
        title = ", ".join(f"{n.replace('_', ' ')} {s}" for n, s in zip(SIZES, sizes, strict=True))
        how = "eager" if compiled is None else f"compiled ({options.compile})"
        print(f"{name}, torch {torch.__version__}, {backend} in a group of one; {title}; {dtype}, {how}")
        print(f"measured here: {bandwidth / 1e9:.0f} GB/s copied, {peak / 1e12:.2f} TFLOP/s in products", flush=True)
        made = table("tp", "rank", "weights", "decode ms", "read ms", "of it", f"prefill {tokens}, ms", "products ms",
                     "of it", "first calls s")  # fmt: skip
        example = {"input_ids": torch.randint(0, sizes[-1], (2, 16), device=device())}
        for tp in options.tp:
            torch.set_default_dtype(dtype)
            with torch.device(device()):
                model = transformers.LlamaForCausalLM(config(sizes)).eval()
            torch.set_default_dtype(torch.float32)
            for rank, local in ranks(model, tp, options.ranks, example, compiled):
                start = time.perf_counter()
                decoded, filled = measured(local, tokens, options.cache, options.rounds)
                took = time.perf_counter() - start - options.rounds * (decoded + filled / 2)
                read, operations = work(local, tokens)
                least, fewest = read / bandwidth, operations / peak
                made.add_row(
                    str(tp), str(rank), bytes_text(read), number(1e3 * decoded), number(1e3 * least),
                    f"{least / decoded:.0%}", number(1e3 * filled), number(1e3 * fewest), f"{fewest / filled:.0%}",
                    f"{took:.0f}",
                )  # fmt: skip
            del model, local
            gc.collect()
        print(render(made, width=160))
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
