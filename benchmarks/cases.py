"""The cases: what a timed step is, the same for every competitor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.models import Competitor


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Args:
        name: what tables call it.
        kind: ``prefill``, a forward that returns the last position's logits; ``decode``, tokens one by one on a
            cache; ``train``, forward, loss and backward.
        size: of which model, ``main`` or ``tiny``.
        batch: how many sequences.
        sequence: how long they are; in ``decode`` the cache.
        rounds: how many times as many rounds as the heaviest cases have.
        units: how many tokens a timed step decodes; times are for one.
        solo: dense and autotp at tp=1, on rank 0 alone.
    """

    name: str
    kind: str
    size: str
    batch: int
    sequence: int
    rounds: int = 1
    units: int = 1
    solo: bool = False

    @property
    def title(self) -> str:
        at = f"{self.batch} x {self.sequence}"
        what = {
            "prefill": f"forward of {at}, no gradients, last logits",
            "decode": f"one token on a cache of {at}, no gradients",
            "train": f"forward, loss and backward of {at}",
        }[self.kind]
        return f"{self.name}: {what}{', the tiny model' if self.size == 'tiny' else ''}"

    @property
    def reference(self) -> str:
        """The model that the others are compared with."""
        return "dense" if self.solo else "hand-written"


CASES = (
    Case("prefill", "prefill", "main", 1, 512),
    Case("decode", "decode", "main", 1, 128, rounds=2, units=16),
    Case("train", "train", "main", 2, 256),
    Case("tiny decode", "decode", "tiny", 1, 128, rounds=4, units=16),
    Case("tiny train", "train", "tiny", 2, 16, rounds=6),
    Case("tp=1, tiny decode", "decode", "tiny", 1, 128, rounds=4, units=16, solo=True),
)


def example(case: Case, vocab: int) -> dict[str, Any]:
    """Inputs that a parallel model is made with."""
    if case.kind == "train":
        ids = torch.zeros(case.batch, case.sequence, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids, "use_cache": False}
    ids = torch.zeros(1, max(case.sequence, 2), dtype=torch.int64)
    return {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}


class Work:
    """A case with its inputs.

    Args:
        case: the case.
        vocab: how many words there are.
    """

    def __init__(self, case: Case, vocab: int) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, vocab, (case.batch, case.sequence), generator=generator)
        self.tokens: Sequence[torch.Tensor] = (
            torch.randint(0, vocab, (case.units, case.batch, 1), generator=generator).unbind()
            if case.kind == "decode"
            else ()
        )

    def ready(self, model: Competitor) -> None:
        """What comes before the first step."""
        module: nn.Module = model.module
        module.train(self.case.kind == "train")
        if self.case.kind == "decode":
            with torch.no_grad():
                model.begin(self.ids)

    def step(self, model: Competitor) -> list[torch.Tensor]:
        """One step; its logits or loss."""
        if self.case.kind == "train":
            return [model.train(self.ids)]
        with torch.no_grad():
            if self.case.kind == "prefill":
                return [model.logits(self.ids)]
            return [model.token(ids) for ids in self.tokens]

    def after(self, model: Competitor) -> None:
        """Make the next step the same again."""
        if self.case.kind == "decode":
            model.back(len(self.tokens))
        for parameter in model.module.parameters():
            parameter.grad = None
