"""Recipes: what a random dense transformer is made of."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """A dense transformer in a few words; the defaults are the simplest one.

    Attributes:
        layers: blocks.
        kv_heads: heads of keys and values.
        queries: heads of queries for each of them.
        head_size: elements of a head.
        hidden: features of the residual stream; 0 for as many as all heads together have.
        ffn: neurons of an MLP.
        vocabulary: words.
        fused: how the weights of queries, keys and values lie: apart, side by side, by group, by head, or the
            latter two side by side.
        weights: how a product with a weight is written.
        attention: how attention is written.
        repeat: how heads of keys and values are brought to as many as the queries have.
        mask: what may not be attended to.
        written: how that is said.
        scores: what is done to scores: soft caps, sinks.
        gate: whether attention's result is gated, by feature or by head.
        qk_norm: a norm of queries and keys, per head or over all of them.
        positions: how positions are told.
        norm: the kind of norms.
        place: where norms stand.
        parallel: whether attention and MLP read the same and are added together.
        mlp: the kind of MLP.
        activation: its activation.
        bias: whether products have biases.
        cross: whether blocks also attend to a memory.
        embedding: what is done to embeddings.
        residual: a multiplier of what is added to the residual stream.
        tied: whether the head's weight is the embedding's.
        loss: how the loss is written.
        batch: rows of the inputs.
        length: their words.
    """

    layers: int = 1
    kv_heads: int = 1
    queries: int = 1
    head_size: int = 2
    hidden: int = 0
    ffn: int = 5
    vocabulary: int = 16
    fused: str = "apart"
    weights: str = "linear"
    attention: str = "sdpa"
    repeat: str = "expand"
    mask: str = "none"
    written: str = "boolean"
    scores: str = "plain"
    gate: str = "none"
    qk_norm: str = "none"
    positions: str = "none"
    norm: str = "layer"
    place: str = "pre"
    parallel: bool = False
    mlp: str = "plain"
    activation: str = "gelu"
    bias: bool = False
    cross: bool = False
    embedding: str = "plain"
    residual: float = 1.0
    tied: bool = False
    loss: str = "none"
    batch: int = 1
    length: int = 1

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return self.kv_heads * self.queries

    @property
    def width(self) -> int:
        """Features of the residual stream."""
        return self.hidden or self.heads * self.head_size

    @property
    def valid(self) -> bool:
        """Whether there is such a model."""
        rotary = self.positions.startswith("rotary")
        return (
            self.heads <= 16
            and not (rotary and self.head_size % 2)
            and not (self.positions == "rotary half" and self.head_size % 4)
            and not (self.repeat == "enable_gqa" and self.attention != "sdpa")
            and not (self.repeat == "grouped" and self.attention == "sdpa")
            and not (self.scores != "plain" and self.attention == "sdpa")
            and not (self.qk_norm == "full" and self.fused not in ("apart", "pair"))
            and not (self.parallel and self.place != "pre")
            and not (self.loss == "shifted" and self.length == 1)
        )

    @staticmethod
    def draw(source: random.Random) -> Recipe:
        """A random recipe."""
        while True:
            recipe = Recipe(**{name: source.choice(values) for name, values in CHOICES.items()})
            if recipe.valid:
                return recipe

    def simpler(self) -> Iterator[Recipe]:
        """Recipes that are simpler in one respect, the simplest first."""
        for name, values in CHOICES.items():
            now = getattr(self, name)
            ordered = list(dict.fromkeys(values))
            for value in ordered[: ordered.index(now)] if now in ordered else ():
                recipe = replace(self, **{name: value})
                if recipe.valid:
                    yield recipe

    def __str__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in given)})"


CHOICES: dict[str, tuple[Any, ...]] = {
    "layers": (1, 2, 2, 3),
    "kv_heads": (1, 2, 2, 3, 4, 4, 5, 6, 7, 8),
    "queries": (1, 1, 1, 2, 3, 4),
    "head_size": (2, 5, 8, 8, 12, 12, 16),
    "hidden": (0, 0, 0, 30, 48, 65),
    "ffn": (5, 64, 67, 97, 130),
    "vocabulary": (16, 300, 401, 512),
    "fused": ("apart", "side by side", "by group", "by head", "pair"),
    "weights": ("linear", "linear", "conv1d", "transposed", "einsum"),
    "attention": ("sdpa", "matmul", "einsum", "baddbmm"),
    "repeat": ("expand", "repeat_interleave", "enable_gqa", "grouped"),
    "mask": ("none", "causal", "padding", "causal padding", "window"),
    "written": ("boolean", "additive", "filled"),
    "scores": ("plain", "plain", "capped", "sinks"),
    "gate": ("none", "none", "feature", "head"),
    "qk_norm": ("none", "none", "head", "full"),
    "positions": ("none", "learnt", "sinusoidal", "rotary", "rotary pairs", "rotary half", "alibi", "relative"),
    "norm": ("layer", "rms", "by hand"),
    "place": ("pre", "post", "sandwich"),
    "parallel": (False, False, True),
    "mlp": ("plain", "gated", "gated side by side", "gated pairs"),
    "activation": ("gelu", "silu", "relu", "tanh gelu", "squared relu"),
    "bias": (False, True),
    "cross": (False, False, False, True),
    "embedding": ("plain", "scaled", "normed", "padded", "typed"),
    "residual": (1.0, 1.0, 0.5),
    "tied": (False, True),
    "loss": ("none", "flattened", "shifted", "log softmax", "classes second"),
    "batch": (1, 2, 3),
    "length": (1, 5, 6, 7),
}
"""What each field may be, simplest first; what stands there twice is drawn more often. Most are large enough for a
split to pay."""
