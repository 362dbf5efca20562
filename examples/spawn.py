"""Training with processes started from Python: ``torch.multiprocessing.spawn``, as in the classic tutorials.

Start it with::

    python examples/spawn.py --tp 2

A small GPT written by hand in plain PyTorch (fused QKV, learnt positions, head tied to the embedding) learns
a paragraph of Lewis Carroll letter by letter, once dense and once split over the processes, from the same
weights and on the same batches. Expect both losses side by side at each step, equal to about six digits; then
the largest difference of a trained weight, from ``autotp.full_state_dict``. The exit code is 1 if a loss
differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import copy
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import autotp

TEXT = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do:
once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in
it, "and what is the use of a book," thought Alice "without pictures or conversations?" So she was considering
in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the
pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when
suddenly a White Rabbit with pink eyes ran close by her. There was nothing so very remarkable in that; nor did
Alice think it so very much out of the way to hear the Rabbit say to itself, "Oh dear! Oh dear! I shall be
late!" """
LETTERS = sorted(set(TEXT))
HIDDEN, HEADS, LAYERS, CONTEXT, BATCH = 96, 6, 3, 64, 16


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, sequence, hidden)`` to the same."""
        batch, sequence, hidden = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, sequence, 3, HEADS, hidden // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, sequence, hidden))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model over letters; with targets it returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(LETTERS), HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, len(LETTERS), bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.05)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """``(batch, sequence)`` letters and those that follow them, to their mean cross entropy."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.view(-1, len(LETTERS)), targets.view(-1))


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same random pieces of the text on every rank."""
    ids = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,), generator=generator).tolist()
        pieces = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
        found.append((pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()))
    return found


def train(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """An ordinary training loop, which knows of no ranks; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for ids, targets in data:
        loss = model(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def worker(rank: int, tp: int, port: int, steps: int) -> None:
    """One process: what a launcher would have set, then the training."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(tp))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // tp))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    dense, data = GPT(), batches(steps)
    model = autotp.parallelize(copy.deepcopy(dense), tp=tp, example_inputs=data[0])

    expected, found = train(dense, data), train(model, data)

    held = sum(p.numel() for p in model.parameters())
    total = sum(p.numel() for p in dense.parameters())
    whole = autotp.full_state_dict(model)
    drift = max(float((t - whole[name]).abs().max()) for name, t in dense.state_dict().items())
    ok = max(abs(a - b) for a, b in zip(expected, found)) < 1e-4
    if rank == 0:
        print(f"\nA GPT of {total:,} parameters over {tp} processes; rank 0 holds {held:,}\n")
        print("step  dense loss  parallel loss  difference")
        for step, (a, b) in enumerate(zip(expected, found), 1):
            if step == 1 or step % max(1, steps // 10) == 0:
                print(f"{step:4}  {a:10.6f}  {b:13.6f}  {abs(a - b):10.1e}")
        print(f"\nlargest difference of a trained weight: {drift:.1e}")
        print("OK: equal losses" if ok else "FAILED: the losses differ", flush=True)
    dist.destroy_process_group()
    if not ok:
        sys.exit(1)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> int:
    """Start the processes and wait."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=2, help="processes to start")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        mp.spawn(worker, (options.tp, free_port(), options.steps), nprocs=options.tp)
    except mp.ProcessExitedException:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
