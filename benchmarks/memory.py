"""Peak memory of a rank while a model is loaded from a checkpoint, and in a training step.

Each model has processes of its own, started by :func:`measure_memory`. What counts is the resident memory
above that of the process with everything imported, before it loads. The peaks are the kernel's, so this is
for Linux. The C library is told to give freed memory back at once, so that the peak is of what is in use.
Pages of the checkpoint's file that are mapped count as well while they are resident, though the kernel
could take them back; how much of what is held after loading is such pages is said apart.

How each loads: the hand-written model reads its parts from the file, one tensor at a time; autotp makes the
model without weights and is given the folder; ``parallelize_module`` splits the model that ``from_pretrained``
made; transformers' own tensor parallelism is an argument of ``from_pretrained``, which wants the package
accelerate for it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

MODELS = ("hand-written", "autotp", "DTensor", "transformers TP")
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(tp: int, *line: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp), *line]


def measure_memory(names: list[str], sizes: list[int], tp: int, batch: int, sequence: int) -> dict[str, Any]:
    """Bytes by model: ``shard``, ``load``, ``held``, ``files``, ``step``; or ``failed``."""
    frugal = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env = {**os.environ, **QUIET, **frugal}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        line = [__file__, folder, "--sizes", *map(str, sizes)]
        subprocess.run([sys.executable, *line, "--save"], env=env, check=True)
        out = os.path.join(folder, "memory.json")
        for name in names:
            if name not in MODELS:
                continue
            step = ["--batch", str(batch), "--sequence", str(sequence), "--model", name, "--out", out]
            ended = subprocess.run(torchrun(tp, *line, *step), env=env, capture_output=True, text=True)
            if ended.returncode:
                said = re.findall(r"^\[rank\d+\]: (\w+(?:\.\w+)*: .*)", ended.stderr, re.MULTILINE)
                found[name] = {"failed": said[-1] if said else f"exit code {ended.returncode}"}
                continue
            with open(out) as file:
                found[name] = json.load(file)
    return found


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, ``RssFile`` of them of files, ``VmHWM`` at most since :func:`forget`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def forget() -> None:
    """Let the peak be what is resident now."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _load(name: str, folder: str, tp: int, example: dict[str, Any]) -> Any:
    import torch.distributed as dist
    import transformers
    from safetensors import safe_open

    import autotp
    from benchmarks import models

    if name == "transformers TP":
        parallel = transformers.distributed.DistributedConfig(tp_size=tp)
        module = models.Llama.from_pretrained(folder, distributed_config=parallel, dtype="float32")
        return models.Competitor(name, module)
    if name == "hand-written":

        def dense(key: str) -> Any:
            with safe_open(os.path.join(folder, "model.safetensors"), "pt") as file:
                return file.get_tensor(key)

        hand = models.MegatronLlama(transformers.LlamaConfig.from_pretrained(folder), dist.get_rank(), tp)
        hand.load(dense)
        return models.HandWritten(name, hand)
    if name == "autotp":
        with autotp.empty_weights():
            module = models.Llama(transformers.LlamaConfig.from_pretrained(folder))
        return models.by_autotp(module, tp, example, True, weights=folder)
    return models.by_dtensor(models.Llama.from_pretrained(folder, dtype="float32"), tp)


def run(options: argparse.Namespace) -> None:
    """One rank; rank 0 writes what it found."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from benchmarks.cases import Case, Work, example
    from benchmarks.measure import largest

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    case = Case("train", "train", "main", options.batch, options.sequence)
    vocab = options.sizes[-1]
    dist.barrier()
    forget()
    empty, files = resident("VmRSS"), resident("RssFile")
    model = _load(options.model, options.folder, dist.get_world_size(), example(case, vocab))
    found = {"load": resident("VmHWM") - empty}
    forget()
    found |= {"held": resident("VmRSS") - empty, "files": resident("RssFile") - files}
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.module.parameters()]
    found["shard"] = sum(p.numel() * p.element_size() for p in parts)
    work = Work(case, vocab)
    work.ready(model)
    for _ in range(2):  # the second is like all that follow
        forget()
        work.step(model)
        found["step"] = resident("VmHWM") - empty
        work.after(model)
    found = {key: largest(value) for key, value in found.items()}
    if dist.get_rank() == 0:
        with open(options.out, "w") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the checkpoint")
    parser.add_argument("--sizes", type=int, nargs=6, metavar="N", help="hidden, layers, heads, KV heads, ffn, words")
    parser.add_argument("--save", action="store_true", help="write the checkpoint, and nothing else")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--out", metavar="FILE")
    options = parser.parse_args()
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    import transformers

    from benchmarks import models

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.save:
        models.Llama(models.config(*options.sizes)).save_pretrained(options.folder)
    else:
        run(options)


if __name__ == "__main__":
    main()
