"""The tutorial network: attention with a fused projection, then an MLP, written without a word of parallelism.

Start it with::

    python examples/tutorial.py --tp 2

or ``torchrun --nproc-per-node 2 examples/tutorial.py``. Expect the rewritten graph of rank 0, in which each
line carries its value's type and shape; the collectives of a step, as planned and as counted (forward: two
all-reduces, one for attention and one for the MLP; backward: two, where whole values enter each of them);
and outputs and gradients against the dense network.
The exit code is 1 if they differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.plans.plan import collectives_table, ranks_table
from autotp.utils.tables import render

HIDDEN, FFN, HEADS = 1024, 4096, 16


class Attention(nn.Module):
    """Multi-head self-attention in plain matmuls, with one fused projection."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, hidden // heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, sequence, hidden)`` to the same."""
        batch, sequence, hidden = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.view(batch, sequence, self.heads, self.size).transpose(1, 2)
        k = k.view(batch, sequence, self.heads, self.size).transpose(1, 2)
        v = v.view(batch, sequence, self.heads, self.size).transpose(1, 2)
        weights = torch.softmax(q @ k.transpose(-2, -1) * self.size**-0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, sequence, hidden))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, ffn)
        self.down = nn.Linear(ffn, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., hidden)`` to the same."""
        return self.down(torch.nn.functional.gelu(self.up(x)))


def distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference over the largest expected magnitude."""
    return float((expected - found).abs().max() / expected.abs().max())


def run() -> int:
    """One rank: split, compare; rank 0 prints. The exit code."""
    rank, tp = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    model = nn.Sequential(Attention(HIDDEN, HEADS), MLP(HIDDEN, FFN))
    x = torch.randn(8, 32, HIDDEN, requires_grad=True)  # as a value between two layers would
    dense = copy.deepcopy(model)
    plan = autotp.plan(model, tp, example_inputs=(x,)) if rank == 0 else None  # only to print

    model = autotp.parallelize(model, tp=tp, example_inputs=(x,), backend="gloo")

    expected = dense(x)
    expected.square().mean().backward()
    assert x.grad is not None
    x_grad, x.grad = x.grad, None
    with autotp.Tally() as forward:
        found = model(x)
    with autotp.Tally() as backward:
        found.square().mean().backward()
    gradients = autotp.full_gradients(model)
    worst = max(distance(p.grad, gradients[n]) for n, p in dense.named_parameters())
    worst = max(worst, distance(x_grad, x.grad))
    error = distance(expected.detach(), found.detach())
    errors: list[Any] = [None] * tp
    dist.all_gather_object(errors, (error, worst))
    ok = all(max(each) < 1e-5 for each in errors)
    if plan is not None:
        print(f"\nTHE GRAPH of rank 0 (I invariant, R replicated, V varying, P pending sum)\n\n{autotp.graph(model)}\n")
        print(render(collectives_table(plan), "", ranks_table(plan), width=100))
        for when, count in (("forward", forward), ("backward", backward)):
            counted = ", ".join(f"{n} {kind}" for kind, n in count.calls.items()) or "none"
            print(f"\n{when}: {plan.count(when)} collectives planned; counted: {counted}", end="")
        print("\n\nrank  output  gradients (largest relative differences from dense)")
        for r, (output, gradient) in enumerate(errors):
            print(f"{r:4}  {output:.0e}   {gradient:.0e}")
        print("OK" if ok else "FAILED", flush=True)
    dist.destroy_process_group()
    return 0 if ok else 1


def main() -> int:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=2, help="processes to start (under torchrun: all that it started)")
    tp = parser.parse_args().tp
    if "RANK" in os.environ:
        return run()
    quiet = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // tp)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp), __file__]
    return subprocess.call(command, env={**quiet, **os.environ})


if __name__ == "__main__":
    sys.exit(main())
